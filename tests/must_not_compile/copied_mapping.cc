// must not compile: deleted
// Two owners of one mapping would unmap it twice.
#include <utility>

#include "core/file.h"

servoflow::MappedFile move_or_copy(servoflow::MappedFile& file) {
#ifdef SF_CONTROL
  return std::move(file);
#else
  return file;
#endif
}
