#include "toolkit/machine_profile.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "contract/json_fields.h"
#include "core/file.h"
#include "core/status_macros.h"
#include "core/thread_pool.h"
#include "ops/backend.h"
#include "ops/device_probe.h"
#include "toolkit/gpu_watch.h"
#include "toolkit/machine.h"

namespace servoflow::toolkit {
namespace {

using contract::JsonFields;
using contract::Problems;

constexpr std::size_t kMaxProfileBytes = std::size_t{8} << 20;
constexpr const char* kKind = "servoflow machine profile";

// ---- writing

Json to_json(const Measured& m) {
  return {{"median", m.median}, {"spread", m.spread}, {"samples", m.samples}};
}

Json to_json(const Steadiness& s) {
  return {{"noisy", s.noisy},   {"throttled", s.throttled},   {"spread", s.spread},
          {"others", s.others}, {"clock_drop", s.clock_drop}, {"reasons", s.reasons}};
}

Json to_json(const BandwidthPoint& p);
Json to_json(const ProductRate& r);
Json to_json(const Latency& l);
Json to_json(const ThreadPoint& t);
Json to_json(const ProbedDevice& d);

template <typename T>
Json list(const std::vector<T>& items) {
  Json out = Json::array();
  for (const T& item : items) out.push_back(to_json(item));
  return out;
}

Json to_json(const BandwidthPoint& p) {
  return {{"bytes", p.bytes},
          {"workers", p.workers},
          {"level", p.level},
          {"read_gbs", to_json(p.read)},
          {"copy_gbs", to_json(p.copy)},
          {"write_gbs", to_json(p.write)}};
}

Json to_json(const ProductRate& r) {
  return {{"stage", r.stage},
          {"site", r.site},
          {"m", r.m},
          {"n", r.n},
          {"k", r.k},
          {"precision", r.precision},
          {"weights", r.cold ? "cold" : "warm"},
          {"by", r.by},
          {"weight_bytes", r.weight_bytes},
          {"us", to_json(r.us)},
          {"gops", r.gops()},
          {"weight_gbs", r.weight_gbs()}};
}

Json to_json(const Latency& l) { return {{"name", l.name}, {"about", l.about}, {"us", to_json(l.us)}}; }

Json to_json(const ThreadPoint& t) {
  return {{"threads", t.threads}, {"expert_us", to_json(t.expert_us)}, {"vision_us", to_json(t.vision_us)}};
}

Json to_json(const ProbedDevice& d) {
  return {{"device", d.device},
          {"name", d.name},
          {"identity", d.identity},
          {"state", d.state},
          {"memory_bytes", d.memory_bytes},
          {"available_bytes", d.available_bytes},
          {"features", d.features},
          {"precisions", d.precisions},
          {"bandwidth", list(d.bandwidth)},
          {"products", list(d.products)},
          {"latencies", list(d.latencies)},
          {"threads", list(d.threads)},
          {"peaks", d.peaks},
          {"steadiness", to_json(d.steadiness)},
          {"skipped", d.skipped}};
}

// ---- reading

double number(JsonFields& f, const std::string& key, double low, double high) {
  const Json* value = f.get(key, true);
  if (value == nullptr) return low;
  if (value->is_number())
    if (const double x = value->get<double>(); std::isfinite(x) && x >= low && x <= high) return x;
  f.problems().add(f.field(key), "must be a number of " + Json(low).dump() + " to " + Json(high).dump() +
                                     ", is " + (value->is_number() ? value->dump() : json_kind(*value)));
  return low;
}

std::uint64_t bytes(JsonFields& f, const std::string& key) {
  return static_cast<std::uint64_t>(number(f, key, 0, 1e18));
}

Json any(JsonFields& f, const std::string& key) {
  const Json* value = f.get(key, true);
  return value != nullptr ? *value : Json();
}

constexpr double kMost = 1e15;  // of any rate or time

Measured read_measured(JsonFields& parent, const std::string& key) {
  Measured out;
  const Json* value = parent.get(key, true);
  if (value == nullptr) return out;
  JsonFields f(*value, parent.field(key), parent.problems());
  if (!f.is_object()) return out;
  out.median = number(f, "median", 0, kMost);
  out.spread = number(f, "spread", 0, kMost);
  out.samples = f.integer("samples", 0, 1 << 30);
  f.refuse_unknown();
  return out;
}

void read(JsonFields& f, BandwidthPoint& p) {
  p.bytes = bytes(f, "bytes");
  p.workers = f.integer("workers", 1, 1 << 20);
  p.level = f.text("level");
  p.read = read_measured(f, "read_gbs");
  p.copy = read_measured(f, "copy_gbs");
  p.write = read_measured(f, "write_gbs");
}

void read(JsonFields& f, ProductRate& r) {
  r.stage = f.text("stage");
  r.site = f.text("site");
  r.m = f.integer("m", 1, 1 << 30);
  r.n = f.integer("n", 1, 1 << 30);
  r.k = f.integer("k", 1, 1 << 30);
  r.precision = f.text("precision");
  const std::string weights = f.text("weights");
  if (weights != "cold" && weights != "warm") f.problems().add(f.field("weights"), "must be cold or warm");
  r.cold = weights == "cold";
  r.by = f.text("by");
  r.weight_bytes = bytes(f, "weight_bytes");
  r.us = read_measured(f, "us");
  // What follows from the others; written for people.
  number(f, "gops", 0, 1e300);
  number(f, "weight_gbs", 0, 1e300);
}

void read(JsonFields& f, Latency& l) {
  l.name = f.text("name");
  l.about = f.text("about");
  l.us = read_measured(f, "us");
}

void read(JsonFields& f, ThreadPoint& t) {
  t.threads = f.integer("threads", 1, 1 << 20);
  t.expert_us = read_measured(f, "expert_us");
  t.vision_us = read_measured(f, "vision_us");
}

void read(JsonFields& f, ProbedDevice& d);

template <typename T>
std::vector<T> read_list(JsonFields& parent, const std::string& key) {
  std::vector<T> out;
  for (const Json* item : parent.elements(key)) {
    JsonFields f(*item, parent.field(key) + "[" + std::to_string(out.size()) + "]", parent.problems());
    out.emplace_back();
    if (!f.is_object()) continue;
    read(f, out.back());
    f.refuse_unknown();
  }
  return out;
}

void read(JsonFields& f, ProbedDevice& d) {
  d.device = f.text("device");
  d.name = f.text("name");
  d.identity = any(f, "identity");
  d.state = any(f, "state");
  d.memory_bytes = bytes(f, "memory_bytes");
  d.available_bytes = bytes(f, "available_bytes");
  d.features = f.texts("features");
  d.precisions = f.texts("precisions");
  d.bandwidth = read_list<BandwidthPoint>(f, "bandwidth");
  d.products = read_list<ProductRate>(f, "products");
  d.latencies = read_list<Latency>(f, "latencies");
  d.threads = read_list<ThreadPoint>(f, "threads");
  d.peaks = any(f, "peaks");
  d.skipped = f.texts("skipped");
  if (const Json* value = f.get("steadiness", true)) {
    JsonFields s(*value, f.field("steadiness"), f.problems());
    if (!s.is_object()) return;
    d.steadiness.noisy = s.boolean("noisy");
    d.steadiness.throttled = s.boolean("throttled");
    d.steadiness.spread = number(s, "spread", 0, kMost);
    d.steadiness.others = number(s, "others", 0, kMost);
    d.steadiness.clock_drop = number(s, "clock_drop", 0, 1);
    d.steadiness.reasons = s.texts("reasons");
    s.refuse_unknown();
  }
}

Choice read_choice(JsonFields& root) {
  Choice out;
  const Json* value = root.get("choice", true);
  if (value == nullptr) return out;
  JsonFields f(*value, "choice", root.problems());
  if (!f.is_object()) return out;
  out.device = f.text("device");
  out.precision = f.text("precision");
  if (out.precision != "fp32" && out.precision != "bf16")
    f.problems().add("choice.precision", "must be fp32 or bf16: auto never chooses a format that loses more");
  out.threads = f.integer("threads", 0, 1024);
  out.why = f.text("why");
  f.refuse_unknown();
  return out;
}

// "key.build.version was 0.1.0, is 0.2.0 now", for every leaf that differs.
void differences(const Json& was, const Json& now, const std::string& path, Problems& problems) {
  if (was == now) return;
  if (was.is_object() && now.is_object()) {
    for (const auto& [key, value] : was.items())
      differences(value, now.contains(key) ? now[key] : Json(), path + "." + key, problems);
    for (const auto& [key, value] : now.items())
      if (!was.contains(key)) differences(Json(), value, path + "." + key, problems);
    return;
  }
  problems.add(path, "was " + was.dump().substr(0, 200) + ", is " + now.dump().substr(0, 200) + " now");
}

}  // namespace

Result<Json> machine_key(const std::vector<std::string>& devices) {
  const Json machine = machine_json();
  Json gpus = Json::array();
  for (const std::string& device : devices) {
    if (device == "cpu") continue;
    int ordinal = 0;
    if (device != "cuda" &&
        (device.rfind("cuda:", 0) != 0 || device.size() > 8 ||
         device.find_first_not_of("0123456789", 5) != std::string::npos || device.size() == 5))
      return Status::invalid("\"" + device.substr(0, 40) + "\" is no device; expected cpu or cuda:N");
    if (device.size() > 5) ordinal = std::atoi(device.c_str() + 5);
    SF_ASSIGN_OR_RETURN(const std::unique_ptr<ops::DeviceProbe> probe, ops::make_cuda_probe(ordinal));
    const ops::GpuIdentity id = probe->identity();
    const GpuWatch watch(id.bus);
    Json driver = watch.limits()["driver"];
    // Without NVML, CUDA's version of it.
    if (driver.is_null())
      driver = "CUDA " + std::to_string(id.driver / 1000) + "." + std::to_string(id.driver % 1000 / 10);
    gpus.push_back({{"device", device}, {"name", id.name}, {"driver", driver}});
  }
  Json build = build_json();
  build["cuda"] = ops::cuda_is_built();
  return Json{{"cpu", machine["cpu"]},
              {"flags", machine["flags"]},
              {"cores", machine["cores"]},
              {"gpus", std::move(gpus)},
              {"build", std::move(build)}};
}

Json profile_to_json(const MachineProfile& p) {
  return {{"kind", kKind},
          {"version", kMachineProfileVersion},
          {"made", p.made},
          {"seconds", p.seconds},
          {"key", p.key},
          {"devices", list(p.devices)},
          {"choice",
           {{"device", p.choice.device},
            {"precision", p.choice.precision},
            {"threads", p.choice.threads},
            {"why", p.choice.why}}},
          {"decisions", p.decisions}};
}

Result<MachineProfile> profile_from_json(const Json& json, const std::string& where) {
  Problems problems(where);
  JsonFields f(json, "", problems);
  MachineProfile out;
  if (!f.is_object()) return problems.status();
  if (f.text("kind") != kKind) {
    problems.add("kind", std::string("must be \"") + kKind + "\"; `servoflow probe` writes such files");
    return problems.status();
  }
  // Of another version nothing else can be told.
  const int version = f.integer("version", 1, 1 << 30);
  if (version != kMachineProfileVersion)
    problems.add("version", std::to_string(version) + "; this build reads version " +
                                std::to_string(kMachineProfileVersion) + ": run `servoflow probe` again");
  if (!problems.empty()) return problems.status();
  out.made = f.text("made");
  out.seconds = number(f, "seconds", 0, kMost);
  out.key = any(f, "key");
  out.devices = read_list<ProbedDevice>(f, "devices");
  if (out.devices.empty()) problems.add("devices", "names none");
  out.choice = read_choice(f);
  out.decisions = any(f, "decisions");
  f.refuse_unknown();
  bool known = false;
  for (const ProbedDevice& d : out.devices) known = known || d.device == out.choice.device;
  if (problems.empty() && !known)
    problems.add("choice.device", "\"" + out.choice.device + "\" is not among the devices");
  SF_RETURN_IF_ERROR(problems.status());
  return out;
}

Result<MachineProfile> read_profile(const std::string& path) {
  SF_ASSIGN_OR_RETURN(const Json json, read_json_file(path, kMaxProfileBytes));
  return profile_from_json(json, path);
}

Status write_profile(const std::string& path, const MachineProfile& profile) {
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  std::error_code error;
  if (!folder.empty()) std::filesystem::create_directories(folder, error);
  if (error) return Status::runtime(folder.string() + ": cannot be made: " + error.message());
  return write_file_atomically(path, profile_to_json(profile).dump(1) + "\n");
}

Status check_fresh(const MachineProfile& profile, const Json& now, const std::string& where) {
  Problems problems(where + ": not of this machine and build");
  differences(profile.key, now, "key", problems);
  if (problems.empty()) return {};
  return Status::invalid(problems.status().message() + "\nrun `servoflow probe` again");
}

std::string default_profile_path() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value != nullptr ? value : "");
  };
  if (const std::string cache = variable("XDG_CACHE_HOME"); !cache.empty())
    return cache + "/servoflow/machine.json";
  if (const std::string home = variable("HOME"); !home.empty())
    return home + "/.cache/servoflow/machine.json";
  return "";
}

Result<std::optional<MachineProfile>> profile_for_auto(const std::string& given) {
  std::optional<MachineProfile> none;
  if (given == "none") return none;
  const std::string path = given.empty() ? default_profile_path() : given;
  if (given.empty() && (path.empty() || !std::filesystem::exists(path))) return none;
  SF_ASSIGN_OR_RETURN(MachineProfile profile, read_profile(path));
  std::vector<std::string> devices;
  for (const ProbedDevice& d : profile.devices) devices.push_back(d.device);
  const Result<Json> now = machine_key(devices);
  if (!now.ok())
    return Status::invalid(path + ": not of this machine and build: " + now.status().message() +
                           "\nrun `servoflow probe` again");
  SF_RETURN_IF_ERROR(check_fresh(profile, *now, path));
  return std::optional(std::move(profile));
}

}  // namespace servoflow::toolkit
