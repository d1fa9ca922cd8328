// must not compile: nodiscard
// A failed Status that nobody looks at is a robot moving on bad input.
#include "servoflow/status.h"

servoflow::Status load();

void caller() {
#ifdef SF_CONTROL
  if (!load().ok()) return;
#else
  load();
#endif
}
