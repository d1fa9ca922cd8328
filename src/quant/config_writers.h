// The two halves of write_config.
#pragma once

#include <set>
#include <span>
#include <string>

#include "core/json.h"
#include "quant/precision_plan.h"
#include "servoflow/status.h"

namespace servoflow::quant {

Result<Json> write_compressed_tensors_config(std::span<const Linear> linears,
                                             std::span<const LinearFormat> formats,
                                             const std::string& version);
Result<Json> write_modelopt_config(std::span<const Linear> linears, std::span<const LinearFormat> formats,
                                   const std::string& version, const std::set<std::string>& pre_quant_scaled);

}  // namespace servoflow::quant
