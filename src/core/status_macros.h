// Early return on failure, for functions that return Status or Result<T>.
#pragma once

#include "servoflow/status.h"

#define SF_CONCAT_INNER(a, b) a##b
#define SF_CONCAT(a, b) SF_CONCAT_INNER(a, b)

#define SF_RETURN_IF_ERROR(expression)                                                   \
  do {                                                                                   \
    if (::servoflow::Status sf_status = (expression); !sf_status.ok()) return sf_status; \
  } while (false)

// SF_ASSIGN_OR_RETURN(auto value, function_returning_result());
#define SF_ASSIGN_OR_RETURN(declaration, expression) \
  SF_ASSIGN_OR_RETURN_INNER(SF_CONCAT(sf_result_, __LINE__), declaration, expression)
#define SF_ASSIGN_OR_RETURN_INNER(result, declaration, expression) \
  auto result = (expression);                                      \
  if (!result.ok()) return result.status();                        \
  declaration = std::move(*result)
