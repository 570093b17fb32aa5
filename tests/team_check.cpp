// Members of a team on threads of their own: every piece of every deal goes to one of them, and once. Compiled and run by test_team.py.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "common/parallel.h"

using namespace pyops::cpu;

namespace {

constexpr int kDeals = 200, kMost = 37;  // deals of 0, 1, .. 36 pieces, 0, ..

// How many pieces were not done once. `meets`: members meet after each deal.
int faults(int size, unsigned seed, bool meets) {
  std::vector<Barrier> barriers(size);
  std::vector<Share> shares(size);
  std::vector<std::atomic<int>> done(kDeals * kMost);
  for (auto& count : done) count = 0;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      const Team team{rank, size, barriers.data(), shares.data()};
      unsigned random = seed * 977 + rank;
      for (int deal = 0; deal < kDeals; ++deal) {
        team.deal(deal % kMost, [&](int64_t piece) {
          ++done[deal * kMost + piece];
          random = random * 1664525 + 1013904223;
          for (volatile unsigned i = 0; i < random >> 22; ++i) {
          }
        });
        if (meets) team.sync();
      }
    });
  for (auto& thread : threads) thread.join();
  int wrong = 0;
  for (int deal = 0; deal < kDeals; ++deal)
    for (int piece = 0; piece < kMost; ++piece) wrong += done[deal * kMost + piece] != (piece < deal % kMost);
  return wrong;
}

}  // namespace

int main() {
  for (int size : {1, 2, 3, 7})
    for (unsigned seed = 0; seed < 4; ++seed)
      if (const int wrong = faults(size, seed, size <= 3 && seed % 2))
        return std::printf("%d members: %d pieces not done once\n", size, wrong), 1;
  Share own[2];
  const Team late{1, 2, nullptr, own};  // the other never comes: its pieces are taken from their end, after the own ones in order
  std::vector<int64_t> order;
  late.deal(6, [&](int64_t piece) { order.push_back(piece); });
  if (order != std::vector<int64_t>{3, 4, 5, 2, 1, 0}) return std::puts("another order"), 1;
  int64_t sum = 0, count = 0;  // more than are dealt one by one
  Share alone;
  Team{0, 1, nullptr, &alone}.deal(3 * kMostPieces + 5, [&](int64_t piece) { sum += piece, ++count; });
  if (count != 3 * kMostPieces + 5 || sum != count * (count - 1) / 2) return std::puts("a long deal lost pieces"), 1;
  return 0;
}
