// must not compile: could not convert|not contextually convertible
// `if (result)` would read as "the value is true" for a Result<bool>: the question is spelled result.ok().
#include "servoflow/status.h"

servoflow::Result<bool> is_ready();

int caller() {
  auto result = is_ready();
#ifdef SF_CONTROL
  if (result.ok()) return 1;
#else
  if (result) return 1;
#endif
  return 0;
}
