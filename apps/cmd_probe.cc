#include <fmt/format.h>

#include <memory>

#include "commands.h"
#include "core/status_macros.h"
#include "ops/backend.h"
#include "toolkit/decision.h"
#include "toolkit/probe.h"

namespace servoflow::cli {
namespace {

struct Options {
  CommonOptions common;
  toolkit::ProbeOptions probe;
  std::string devices = "all", profile, show;
  bool no_profile = false, figures = false, rules = false;
};

std::string figures_text() {
  std::string out;
  for (const auto& [name, meaning] : toolkit::figure_meanings())
    out += fmt::format("{:<18} {}\n", name, meaning);
  return out;
}

Status probe(Options& o) {
  const Output out(o.common);
  if (o.figures || o.rules) {
    out.text(o.rules ? std::string(toolkit::builtin_rules_text()) : figures_text());
    return {};
  }
  if (!o.show.empty()) {
    SF_ASSIGN_OR_RETURN(const toolkit::MachineProfile profile, toolkit::read_profile(o.show));
    SF_RETURN_IF_ERROR(out.json(toolkit::profile_to_json(profile)));
    out.text(toolkit::probe_text(profile));
    return {};
  }
  if (o.devices != "all") {
    SF_ASSIGN_OR_RETURN(o.probe.devices, ops::device_list(o.devices));
    for (std::string& device : o.probe.devices) {
      if (device == "cuda") device = "cuda:0";
      if (device != "cpu" && device.rfind("cuda:", 0) != 0)
        return Status::invalid("--device: \"" + device +
                               "\" cannot be probed; choose all, cpu, cuda:N or cuda:all");
    }
  }
  if (o.common.threads > 0) o.probe.threads = o.common.threads;
  Progress progress("probing");
  o.probe.progress = [&](double share, const std::string& doing) {
    progress.update(static_cast<std::uint64_t>(share * 100), 100, doing);
  };
  SF_ASSIGN_OR_RETURN(const toolkit::MachineProfile profile, toolkit::run_probe(o.probe));
  progress.finish();
  SF_RETURN_IF_ERROR(out.json(toolkit::profile_to_json(profile)));
  std::string text = toolkit::probe_text(profile);
  if (!o.no_profile) {
    const std::string path = o.profile.empty() ? toolkit::default_profile_path() : o.profile;
    if (path.empty())
      return Status::invalid(
          "--profile: neither XDG_CACHE_HOME nor HOME is set; name a FILE, or give --no-profile");
    SF_RETURN_IF_ERROR(toolkit::write_profile(path, profile).with_context("--profile"));
    text += "written to " + path + ", where --device auto and --precision auto read it\n";
  }
  out.text(text);
  return {};
}

}  // namespace

void add_probe(CLI::App& app, Action& action) {
  auto o = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand(
      "probe",
      "Measure this machine: bandwidth, products of the model's sizes, latencies; say what follows from it");
  sub->add_option("--device", o->devices, "What to measure")
      ->type_name("all|cpu|cuda[:N[,N...]]|cuda:all")
      ->capture_default_str();
  sub->add_option("--threads", o->common.threads,
                  "CPU threads at most; 0 is one per core this process may use")
      ->check(CLI::Range(0, 1024))
      ->type_name("N")
      ->capture_default_str();
  sub->add_option("--profile", o->profile,
                  "Where the machine's profile goes; default: $XDG_CACHE_HOME/servoflow/machine.json")
      ->type_name("FILE");
  sub->add_flag("--no-profile", o->no_profile, "Write no profile: auto stays as it is")
      ->excludes("--profile");
  sub->add_option("--seconds", o->probe.cpu_seconds,
                  "For the CPU at most; what does not fit is left out, by name")
      ->check(CLI::Range(2.0, 600.0))
      ->type_name("S")
      ->capture_default_str();
  sub->add_option("--gpu-seconds", o->probe.gpu_seconds, "For each GPU at most")
      ->check(CLI::Range(2.0, 600.0))
      ->type_name("S")
      ->capture_default_str();
  sub->add_option("--cublaslt", o->probe.cublaslt,
                  "cuBLASLt to measure beside this engine on a GPU; default: the one the system finds")
      ->type_name("FILE");
  sub->add_option("--show", o->show, "Only print a profile that was written before, of any machine")
      ->type_name("FILE");
  sub->add_flag("--figures", o->figures, "Only list the figures that rules reason with");
  sub->add_flag("--rules", o->rules, "Only print the rules");
  add_output_options(*sub, o->common);
  add_examples(*sub, "servoflow probe --json machine.json", "servoflow probe --show machine.json");
  sub->callback([o, &action] {
    set_up_logging(o->common);
    action = [o] { return probe(*o); };
  });
}

}  // namespace servoflow::cli
