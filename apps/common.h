// What all subcommands share: common options, where results and logs go, and how failures end the process.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"
#include "servoflow/policy.h"
#include "servoflow/status.h"

namespace servoflow::cli {

// Set by the subcommand that was parsed; run after parsing, outside CLI11.
using Action = std::function<Status()>;

// Options that mean the same in every subcommand that has them.
struct CommonOptions {
  std::string device = "auto", precision, tokenizer, assets, json, log_level = "info", profile;
  int threads = 0;
};

// --json and --log-level: every subcommand.
void add_output_options(CLI::App& app, CommonOptions& options);
// --log-level alone: the subcommand without a result.
void add_log_option(CLI::App& app, CommonOptions& options);
// --device, --precision, --threads: subcommands that run a network.
void add_device_options(CLI::App& app, CommonOptions& options, const std::string& default_precision);
// --profile: subcommands where auto may be what the machine's profile recommends.
void add_profile_option(CLI::App& app, CommonOptions& options);
// Fills in what is auto from the machine's profile, says so on stderr, and gives what was chosen, for the
// reply; null where no profile had a say. To be called before policy_options.
Result<Json> apply_machine_profile(CommonOptions& options, const std::string& checkpoint);
// --tokenizer and --assets: subcommands that read a checkpoint.
void add_checkpoint_options(CLI::App& app, CommonOptions& options);
// --seed: any unsigned 64-bit number.
void add_seed_option(CLI::App& app, std::uint64_t& seed, const std::string& help);
// --help ends with these two commands.
void add_examples(CLI::App& app, const std::string& first, const std::string& second);

PolicyOptions policy_options(const CommonOptions& options);

// The result: text on stdout, and JSON where --json asks for it. `--json -` gives stdout to JSON and text to
// stderr.
class Output {
 public:
  explicit Output(const CommonOptions& options) : json_(options.json) {}
  void text(const std::string& text) const;
  // Writes JSON if it was asked for.
  Status json(const Json& json) const;

 private:
  std::string json_;
};

// Logs go to stderr. Called once the options are known.
void set_up_logging(const CommonOptions& options);
void log_info(const std::string& message);
void log_warning(const std::string& message);

// Progress on stderr: a bar on a terminal, a line per quarter elsewhere; nothing when logs below warnings are
// off.
class Progress {
 public:
  explicit Progress(std::string label) : label_(std::move(label)) {}
  ~Progress() { finish(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void update(std::uint64_t done, std::uint64_t total, const std::string& detail = "");
  void finish();

 private:
  std::string label_;
  int shown_ = -1;  // percent on a terminal, quarters elsewhere
  bool open_ = false;
};

// "0.1,-2,3e-4" as finite numbers; `option` names the error.
Result<std::vector<double>> parse_numbers(const std::string& text, const std::string& option);
// "SLOT=FILE"; the file name may contain '='.
Result<std::pair<std::string, std::string>> parse_assignment(const std::string& text,
                                                             const std::string& option);

// Flushes stdout: a full disk must not look like success.
Status flush_output();

}  // namespace servoflow::cli
