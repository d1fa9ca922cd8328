// must not compile: nodiscard
#include "servoflow/status.h"

servoflow::Result<int> count();

int caller() {
#ifdef SF_CONTROL
  auto result = count();
  return result.ok() ? *result : -1;
#else
  count();
  return 0;
#endif
}
