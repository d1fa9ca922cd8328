// must not compile: cannot convert|no viable conversion
// A Result never turns into its value by itself: somebody has to have asked ok().
#include "servoflow/status.h"

servoflow::Result<int> count();

int caller() {
#ifdef SF_CONTROL
  auto result = count();
  return result.ok() ? result.value() : -1;
#else
  int n = count();
  return n;
#endif
}
