#include "ops/backend.h"

#include <algorithm>
#include <cstring>

#include "core/status_macros.h"
#include "ops/composite/composite.h"

namespace servoflow::ops {

std::int64_t Backend::pitch(int cols, DType) const { return cols; }

bool Backend::check(const char* op, const char* broken) {
  if (failed()) return false;
  if (broken != nullptr) status_ = Status::runtime(name() + " " + op + ": contract broken: " + broken);
  return broken == nullptr;
}

void Backend::fail(Status status) {
  if (status_.ok()) status_ = std::move(status);
}

std::string Backend::low_bit_kernel(const quant::LinearFormat&) const { return {}; }

Status Backend::refuse_format(const quant::LinearFormat& format, const std::string& tensor) const {
  const bool shared = format.input.quantized() && format.input.dynamic &&
                      format.input.granularity == quant::Granularity::kTensor;
  return Status::invalid(
      tensor + ": format " + quant::name(format) + " has no kernel on " + name() +
      (shared ? ": one input scale over all rows at hand would make an answer depend on its batch; quantize "
                "inputs per "
                "token or with a static scale"
              : "; choose --precision bf16, which dequantizes the weights, or another --device or recipe"));
}

Status Backend::finish() {
  Status waited = wait();
  Status out = status_.ok() ? std::move(waited) : std::move(status_);
  status_ = {};
  return out;
}

Result<void*> Backend::allocate_staging(std::uint64_t bytes) {
  HostBlock block(bytes > 0 ? bytes : 1);
  if (block.data() == nullptr)
    return Status::runtime("out of memory: " + std::to_string(bytes) + " bytes of staging");
  staging_.push_back(std::move(block));
  return static_cast<void*>(staging_.back().data());
}

const char* Backend::keep_name(std::string name) {
  names_.push_back(std::move(name));
  return names_.back().c_str();
}

void Backend::copy(void* to, const void* from, std::size_t bytes) {
  if (!failed()) std::memcpy(to, from, bytes);
}

void Backend::replay(std::uint64_t, const std::function<void()>& feed, const std::function<void()>& body) {
  feed();
  body();
}

void Backend::siglip_block(const SiglipBlock& op) { ops::siglip_block(*this, op); }
void Backend::gemma_layer(const GemmaLayer& op) { ops::gemma_layer(*this, op); }
void Backend::expert_step(const ExpertStep& op) { ops::expert_step(*this, op); }
void Backend::denoise_loop(const DenoiseLoop& op) { ops::denoise_loop(*this, op); }

Result<std::vector<std::string>> device_list(const std::string& devices) {
  std::vector<std::string> out;
  if (devices == "cuda:all") {
    for (int i = 0; i < std::max(1, cuda_device_count()); ++i) out.push_back("cuda:" + std::to_string(i));
    return out;
  }
  for (std::size_t begin = 0; begin <= devices.size();) {
    const std::size_t end = std::min(devices.find(',', begin), devices.size());
    std::string one = devices.substr(begin, end - begin);
    begin = end + 1;
    const bool number = !one.empty() && one.find_first_not_of("0123456789") == std::string::npos;
    if (number && !out.empty() && out.back().starts_with("cuda")) one = "cuda:" + one;
    if (one == "cuda" && devices != one) one = "cuda:0";
    const bool gpu = one.starts_with("cuda");
    if (one.empty() || (gpu && std::find(out.begin(), out.end(), one) != out.end()))
      return Status::invalid("--device: \"" + devices + "\": " +
                             (one.empty() ? std::string("an entry is empty") : one + " stands there twice") +
                             "; several GPUs are cuda:0,1 or cuda:all");
    out.push_back(std::move(one));
  }
  return out;
}

Result<BackendChoice> make_backend(const BackendOptions& options) {
  const std::string& device = options.device;
  const std::string precision = options.precision == "auto" ? "bf16" : options.precision;
  if (precision != "fp32" && precision != "bf16")
    return Status::invalid("--precision: \"" + precision + "\" is not known; choose auto, fp32 or bf16");
  if (device.find(',') != std::string::npos || device == "cuda:all")
    return Status::invalid("--device: \"" + device + "\" names several devices; one is needed here");
  BackendChoice choice;
  choice.precision = precision;
  if (device == "auto" || device == "cpu") {
    SF_ASSIGN_OR_RETURN(choice.backend, make_cpu_backend(precision, options.threads));
  } else if (device == "reference") {
    if (options.precision == "bf16")
      return Status::invalid("--precision: the reference backend computes in fp32 only");
    choice.precision = "fp32";
    SF_ASSIGN_OR_RETURN(choice.backend, make_reference_backend());
  } else if (device == "cuda" || device.rfind("cuda:", 0) == 0) {
    int ordinal = 0;
    if (device.size() > 4) {
      const std::string number = device.substr(5);
      if (number.empty() || number.size() > 3 || number.find_first_not_of("0123456789") != std::string::npos)
        return Status::invalid("--device: \"" + device + "\": expected cuda or cuda:N");
      ordinal = std::stoi(number);
    }
    SF_ASSIGN_OR_RETURN(choice.backend, make_cuda_backend(precision, ordinal));
  } else {
    return Status::invalid("--device: \"" + device + "\" is not known; choose auto, cpu, cuda or cuda:N");
  }
  return choice;
}

}  // namespace servoflow::ops
