// The denoise loop's kernel once more, for tests: it waits where nothing has to wait, and can be made to
// stall.
#pragma once

#include "ops/backend.h"

namespace servoflow::ops::cuda {

struct LoopTrouble {
  // A quarter of all (block, warp, place in the code), another one for each seed, waits 0 to 20 µs every time
  // it comes by: before it counts, fetches or sends, and after it has waited. 0: nobody.
  unsigned seed = 0;
  // This block does not count on a counter of [first, end) of any request that has come to `from`.
  int silent_block = -1, first = 0, end = 0;
  unsigned from = 0;
};

// From now on this backend's denoise loops run on the copy, in trouble. False where it has no loop in one
// launch, or where the copy does not fit.
bool trouble_loop(Backend& backend, const LoopTrouble& trouble);
void undo_trouble(Backend& backend);
// How often the copy was launched in this process.
int troubled_launches();

}  // namespace servoflow::ops::cuda
