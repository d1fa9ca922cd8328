#include "common.h"

#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <charconv>
#include <cmath>
#include <cstdio>
#include <memory>

#include "core/file.h"
#include "core/status_macros.h"
#include "toolkit/auto_choice.h"
#include "toolkit/writers.h"

namespace servoflow::cli {

void add_output_options(CLI::App& app, CommonOptions& options) {
  app.add_option("--json", options.json,
                 "Also write the result as JSON to FILE; '-' is stdout, text then goes to stderr")
      ->type_name("FILE");
  add_log_option(app, options);
}

void add_log_option(CLI::App& app, CommonOptions& options) {
  app.add_option("--log-level", options.log_level, "What to log to stderr")
      ->check(CLI::IsMember({"trace", "debug", "info", "warn", "error", "off"}).description(""))
      ->type_name("trace|debug|info|warn|error|off")
      ->capture_default_str();
}

void add_device_options(CLI::App& app, CommonOptions& options, const std::string& default_precision) {
  options.precision = default_precision;
  app.add_option("--device", options.device, "Where to run")
      ->type_name("auto|cpu|cuda[:N[,N...]]|cuda:all")
      ->capture_default_str();
  app.add_option(
         "--precision", options.precision,
         "Number format; auto is a quantized checkpoint's own, else bf16 where the device has it; a recipe "
         "(int8-w8a8, nvfp4-w4a16, ...) or a plan (.toml, .json) rounds the weights while they are loaded")
      ->type_name("auto|fp32|bf16|RECIPE|FILE")
      ->capture_default_str();
  app.add_option("--threads", options.threads, "CPU threads; 0 is one per core this process may use")
      ->check(CLI::Range(0, 1024))
      ->type_name("N")
      ->capture_default_str();
}

void add_profile_option(CLI::App& app, CommonOptions& options) {
  app.add_option(
         "--profile", options.profile,
         "What `servoflow probe` found out, for auto; none: auto without it; default: the one it wrote last")
      ->type_name("FILE|none");
}

Result<Json> apply_machine_profile(CommonOptions& options, const std::string& checkpoint) {
  SF_ASSIGN_OR_RETURN(const toolkit::AutoChoice choice, toolkit::choose_auto({.device = options.device,
                                                                              .precision = options.precision,
                                                                              .threads = options.threads,
                                                                              .profile = options.profile,
                                                                              .checkpoint = checkpoint}));
  if (!choice.warning.empty()) log_warning(choice.warning);
  if (!choice.note.empty()) log_info(choice.note);
  options.device = choice.device;
  options.precision = choice.precision;
  options.threads = choice.threads;
  return choice.chosen;
}

void add_checkpoint_options(CLI::App& app, CommonOptions& options) {
  app.add_option("--tokenizer", options.tokenizer, "SentencePiece model; default: searched in the checkpoint")
      ->type_name("FILE");
  app.add_option("--assets", options.assets,
                 "Statistics folder under CHECKPOINT/assets; default: the robot's, else the only one")
      ->type_name("ID");
}

void add_seed_option(CLI::App& app, std::uint64_t& seed, const std::string& help) {
  // CLI11 wraps negative numbers around, saturates large ones and takes hexadecimal ones.
  const auto plain = [](std::string& text) {
    std::uint64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    const bool whole = error == std::errc() && end == text.data() + text.size();
    return whole ? std::string() : "\"" + text + "\" is not a whole number of 0 to 2^64 - 1";
  };
  app.add_option("--seed", seed, help)
      ->check(CLI::Validator(plain, ""))
      ->type_name("S")
      ->capture_default_str();
}

void add_examples(CLI::App& app, const std::string& first, const std::string& second) {
  app.footer("Examples:\n  " + first + "\n  " + second);
}

PolicyOptions policy_options(const CommonOptions& options) {
  return {.device = options.device,
          .precision = options.precision,
          .threads = options.threads,
          .tokenizer = options.tokenizer,
          .assets = options.assets};
}

void Output::text(const std::string& text) const {
  std::FILE* to = json_ == "-" ? stderr : stdout;
  std::fwrite(text.data(), 1, text.size(), to);
}

Status Output::json(const Json& json) const {
  if (json_.empty()) return {};
  const std::string text = toolkit::json_text(json) + "\n";
  if (json_ != "-") return write_file_atomically(json_, text).with_context("--json");
  std::fwrite(text.data(), 1, text.size(), stdout);
  return {};
}

void set_up_logging(const CommonOptions& options) {
  auto logger = spdlog::stderr_color_mt("servoflow");
  logger->set_pattern("%^%l%$: %v");
  logger->set_level(options.log_level == "warn" ? spdlog::level::warn
                                                : spdlog::level::from_str(options.log_level));
  spdlog::set_default_logger(logger);
}

void log_info(const std::string& message) { spdlog::info("{}", message); }
void log_warning(const std::string& message) { spdlog::warn("{}", message); }

void Progress::update(std::uint64_t done, std::uint64_t total, const std::string& detail) {
  if (!spdlog::should_log(spdlog::level::info) || total == 0) return;
  const int percent =
      static_cast<int>(100.0 * static_cast<double>(std::min(done, total)) / static_cast<double>(total));
  if (::isatty(STDERR_FILENO) != 1) {
    if (percent / 25 == shown_) return;
    shown_ = percent / 25;
    fmt::print(stderr, "{}: {} %{}\n", label_, percent, detail.empty() ? "" : " " + detail);
    return;
  }
  if (percent == shown_ && detail.empty()) return;
  shown_ = percent;
  open_ = true;
  constexpr int kWidth = 30;
  const int filled = percent * kWidth / 100;
  fmt::print(stderr, "\r\033[K{} [{:#<{}}{:.<{}}] {:3} %{}", label_, "", filled, "", kWidth - filled, percent,
             detail.empty() ? "" : " " + detail);
  std::fflush(stderr);
}

void Progress::finish() {
  if (open_) fmt::print(stderr, "\r\033[K");
  open_ = false;
}

Result<std::vector<double>> parse_numbers(const std::string& text, const std::string& option) {
  std::vector<double> out;
  std::size_t begin = 0;
  while (true) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    std::size_t first = begin, last = end;
    while (first < last && text[first] == ' ') ++first;
    while (last > first && text[last - 1] == ' ') --last;
    double value = 0;
    const auto [stop, error] = std::from_chars(text.data() + first, text.data() + last, value);
    if (error != std::errc() || stop != text.data() + last || !std::isfinite(value))
      return Status::invalid(
          fmt::format("{}: value {} (\"{}\") is not a finite number; expected numbers separated by commas, "
                      "such as 0.1,-2,3e-4",
                      option, out.size() + 1, text.substr(begin, std::min<std::size_t>(end - begin, 40))));
    out.push_back(value);
    if (end == text.size()) return out;
    begin = end + 1;
  }
}

Result<std::pair<std::string, std::string>> parse_assignment(const std::string& text,
                                                             const std::string& option) {
  const std::size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0 || equals + 1 == text.size())
    return Status::invalid(option + " \"" + text.substr(0, 80) +
                           "\": expected SLOT=FILE, such as base_0_rgb=frame.png");
  return std::pair(text.substr(0, equals), text.substr(equals + 1));
}

Status flush_output() {
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
    return Status::runtime("stdout: cannot write the result");
  return {};
}

}  // namespace servoflow::cli
