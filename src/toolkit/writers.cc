#include "toolkit/writers.h"

#include <fmt/format.h>

#include <filesystem>

#include "core/file.h"
#include "core/status_macros.h"
#include "toolkit/npy.h"

namespace servoflow::toolkit {
namespace {

template <typename T>
Json rows(const std::vector<T>& values, int columns) {
  Json out = Json::array();
  const auto width = static_cast<std::size_t>(columns);
  for (std::size_t at = 0; width > 0 && at + width <= values.size(); at += width)
    out.push_back(std::vector<T>(values.begin() + static_cast<std::ptrdiff_t>(at),
                                 values.begin() + static_cast<std::ptrdiff_t>(at + width)));
  return out;
}

std::string ending(const std::string& path) { return std::filesystem::path(path).extension().string(); }

}  // namespace

Json precisions_to_json(const std::vector<ComponentPrecision>& components) {
  Json out = Json::array();
  for (const ComponentPrecision& c : components)
    out.push_back({{"component", c.component},
                   {"precision", c.precision},
                   {"kernel", c.kernel.empty() ? Json(nullptr) : Json(c.kernel)},
                   {"layers", c.layers},
                   {"parameters", c.parameters},
                   {"weight_bytes", c.weight_bytes}});
  return out;
}

std::string precisions_text(const std::vector<ComponentPrecision>& components) {
  std::string out;
  for (const ComponentPrecision& c : components)
    if (!c.kernel.empty())
      out += fmt::format("{}: {} layers in {}: {}\n", c.component, c.layers, c.precision, c.kernel);
  return out;
}

Json chunk_to_json(const ActionChunk& c) {
  return {{"horizon", c.horizon},
          {"action_dim", c.action_dim},
          {"actions", rows(c.actions, c.action_dim)},
          {"normalized", rows(c.normalized, c.model_dim)},
          {"times_ms",
           {{"preprocess", c.times.preprocess},
            {"vision", c.times.vision},
            {"prefix", c.times.prefix},
            {"denoise", c.times.denoise},
            {"steps", c.times.steps},
            {"postprocess", c.times.postprocess},
            {"total", c.times.total}}},
          {"recorded", c.times.recorded},
          {"prefix_tokens", c.prefix_tokens},
          {"prompt_truncated", c.prompt_truncated},
          {"request", c.request},
          {"device", c.device},
          {"backend", c.backend},
          {"precision", c.precision},
          {"contract_hash", c.contract_hash}};
}

std::string chunk_to_csv(const ActionChunk& c) {
  std::string out = "step";
  for (int d = 0; d < c.action_dim; ++d) out += fmt::format(",a{}", d);
  out += '\n';
  for (int h = 0; h < c.horizon; ++h) {
    out += std::to_string(h);
    for (int d = 0; d < c.action_dim; ++d)
      out +=
          fmt::format(",{}", c.actions[static_cast<std::size_t>(h) * static_cast<std::size_t>(c.action_dim) +
                                       static_cast<std::size_t>(d)]);
    out += '\n';
  }
  return out;
}

Status check_chunk_path(const std::string& path) {
  const std::string end = ending(path);
  if (end == ".npy" || end == ".json" || end == ".csv") return {};
  return Status::invalid("--out " + path + ": the ending decides the format, use .npy, .json or .csv");
}

Status write_chunk(const ActionChunk& chunk, const std::string& path) {
  SF_RETURN_IF_ERROR(check_chunk_path(path));
  if (ending(path) == ".json") return write_file_atomically(path, json_text(chunk_to_json(chunk)) + "\n");
  if (ending(path) == ".csv") return write_file_atomically(path, chunk_to_csv(chunk));
  return write_file_atomically(path, npy_bytes({chunk.horizon, chunk.action_dim}, chunk.actions));
}

std::string json_text(const Json& json) { return json.dump(2, ' ', false, Json::error_handler_t::replace); }

}  // namespace servoflow::toolkit
