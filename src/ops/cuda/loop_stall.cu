// Host code beside the kernel's own plan of who counts where.
#include <algorithm>

#include "ops/cuda/expert_loop_parts.cuh"
#include "ops/cuda/loop_stall.h"

namespace servoflow::ops::cuda {
namespace {

using namespace loop;

constexpr const char *kEdge = "edge", *kQkv = "q/k/v", *kAttention = "attention", *kOut = "out",
                     *kGateUp = "gate/up", *kDown = "down";

// A phase of a turn, of which there is one for every layer of every step, and the counters that end it.
struct Exchange {
  const char* phase;
  int turn, first_counter, counters;
};

class Stall {
 public:
  Stall(const LoopStall& stall, const LoopLaunch& launch) : s_(stall), l_(launch) {
    // Every request's first edge counts its rows.
    for (int i = 0; i < kLoopRequests; ++i)
      if (s_.counts[i * kLoopCounters + kEdges] != 0) requests_ = i + 1;
  }

  // The first exchange of the sequence that is not complete.
  std::string stands_at() const {
    const int turns = l_.steps * l_.depth;
    for (int turn = 0; turn <= turns; ++turn) {
      const Exchange sequence[] = {{kEdge, turn, kEdges, 1},
                                   {kQkv, turn, kKeys, kLoopRanks},
                                   {kAttention, turn, kAttended, kLoopRanks},
                                   {kOut, turn, kColumns, kLoopRanks},
                                   {kGateUp, turn, kHidden, kLoopRanks},
                                   {kDown, turn, kColumns, kLoopRanks}};
      for (const Exchange& e : sequence) {
        if (e.phase == kEdge ? turn % l_.depth != 0 : turn == turns) continue;
        if (const std::string who = lacking(e); !who.empty()) return place_of(e) + ": " + who;
      }
    }
    return "no exchange: everybody has counted";
  }

  // What a block does next when this counter has come to what was wanted.
  std::string given_up() const {
    const int which = static_cast<int>(s_.counter) % kLoopCounters, wanted = static_cast<int>(s_.wanted);
    const int products = wanted / kLoopClusters;  // of out and down
    const bool after_step = products % (2 * l_.depth) == 0;
    const char* next = which == kEdges     ? kQkv
                       : which < kKeys     ? (products % 2 != 0 ? kGateUp
                                              : after_step      ? kEdge
                                                                : kQkv)
                       : which < kAttended ? kAttention
                       : which < kHidden   ? kOut
                                           : kDown;
    return "block " + std::to_string(s_.block) + " (cluster " + std::to_string(s_.block / kLoopRanks) +
           ", rank " + std::to_string(s_.block % kLoopRanks) + ") gave up before " + next + " of request " +
           std::to_string(s_.counter / kLoopCounters) + ", having seen " + std::to_string(s_.seen) + " of " +
           std::to_string(wanted) + " arrivals since the launch at " + name_of(which);
  }

 private:
  static std::string name_of(int which) {
    if (which == kEdges) return "the rows' counter";
    const char* of = which < kKeys       ? "rank "
                     : which < kAttended ? "key group "
                     : which < kHidden   ? "head "
                                         : "slice ";
    return std::string("the counter of ") + of + std::to_string((which - kColumns) % kLoopRanks);
  }

  std::string place_of(const Exchange& e) const {
    std::string out = "step " + std::to_string(l_.first + e.turn / l_.depth) + ", ";
    if (e.phase != kEdge) return out + "layer " + std::to_string(e.turn % l_.depth) + ", " + e.phase;
    return e.turn == l_.steps * l_.depth ? "the last " + std::string(kEdge) : out + kEdge;
  }

  // Arrivals of one exchange at its counter `i`, and how many turns' worth came before.
  int arrivals(const Exchange& e, int i) const {
    if (e.phase == kEdge) return l_.rows;
    if (e.phase == kQkv) return kKeyGroups / kLoopRanks;
    if (e.phase == kAttention) return kLoopRanks;
    if (e.phase != kGateUp) return i < (l_.rows + 7) / 8 ? kLoopClusters : 0;  // eight rows have an owner
    int blocks = 0;
    for (int b = 0; b < kLoopBlocks; ++b) blocks += first_slice(b) <= i && i <= last_slice(b) ? 1 : 0;
    return blocks;
  }
  int exchanges_before(const Exchange& e) const {
    if (e.phase == kEdge) return e.turn / l_.depth;
    if (e.first_counter == kColumns) return 2 * e.turn + (e.phase == kDown ? 1 : 0);
    return e.turn;
  }

  // How many have counted of whom, or nothing where all have.
  std::string lacking(const Exchange& e) const {
    std::string out;
    for (int request = 0; request < std::max(1, requests_); ++request) {
      std::string who;
      for (int i = 0; i < e.counters; ++i) {
        const int own = arrivals(e, i);
        const int came = static_cast<int>(s_.counts[request * kLoopCounters + e.first_counter + i]) -
                         own * exchanges_before(e);
        if (came >= own) continue;
        who += (who.empty() ? "" : ", ") + std::to_string(std::max(0, came)) + " of " + std::to_string(own) +
               (e.phase == kEdge  ? " rows"
                : e.phase == kQkv ? " blocks with keys and values, every eighth from " + std::to_string(i)
                : e.phase == kAttention ? " blocks of cluster " + std::to_string(i)
                : e.phase == kGateUp    ? " blocks of slice " + std::to_string(i)
                                        : " blocks of rank " + std::to_string(i));
      }
      if (!who.empty())
        out += (out.empty() ? "" : "; ") + ("request " + std::to_string(request) + ": " + who);
    }
    return out;
  }

  const LoopStall& s_;
  const LoopLaunch& l_;
  int requests_ = 0;
};

}  // namespace

std::string describe(const LoopStall& stall, const LoopLaunch& launch) {
  if (launch.depth < 1) return "nothing is known of the launch";
  const Stall s(stall, launch);
  return "it stands at " + s.stands_at() + " have counted; " + s.given_up();
}

}  // namespace servoflow::ops::cuda
