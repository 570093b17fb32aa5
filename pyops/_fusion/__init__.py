"""What `pyops.fuse` is made of: classes that modules change to and back (`classes`), forwards whose neighbouring calls run as one
(`rewrite`, `runs`), the layout of images (`layout`), and what is known of whose classes (`rules` and the files beside it)."""
