#include "toolkit/device_profile.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "contract/json_fields.h"
#include "core/status_macros.h"
#include "toolkit/plan_toml.h"

namespace servoflow::toolkit {
namespace {

using contract::JsonFields;
using contract::Problems;

constexpr std::array<const char*, 5> kPrecisions = {"fp32", "bf16", "fp8", "int8", "fp4"};

// A finite number in [low, high]; absent is `fallback`, or an error without one.
double number(JsonFields& fields, const std::string& key, double low, double high,
              std::optional<double> fallback = std::nullopt) {
  const Json* value = fields.get(key, !fallback);
  if (value == nullptr) return fallback.value_or(low);
  if (!value->is_number()) {
    fields.problems().add(fields.field(key), "must be a number, is " + json_kind(*value));
    return fallback.value_or(low);
  }
  const double x = value->get<double>();
  if (std::isfinite(x) && x >= low && x <= high) return x;
  fields.problems().add(fields.field(key),
                        fmt::format("must lie between {:g} and {:g}, is {:g}", low, high, x));
  return fallback.value_or(low);
}

DeviceRates read_rates(const Json& json, const std::string& path, Problems& problems, bool bandwidth_needed) {
  JsonFields fields(json, path, problems);
  DeviceRates out;
  if (!fields.is_object()) return out;
  out.source = fields.text("source");
  if (out.source.empty() && json.contains("source") && json["source"].is_string())
    problems.add(fields.field("source"), "is empty; a rate without its source is hearsay");
  out.bandwidth_gbs =
      number(fields, "bandwidth_gbs", 0.1, 1e6, bandwidth_needed ? std::nullopt : std::optional<double>(0));
  out.bandwidth_low_gbs = number(fields, "bandwidth_low_gbs", 0.1, 1e6, 0);
  out.bandwidth_high_gbs = number(fields, "bandwidth_high_gbs", 0.1, 1e6, 0);
  if (out.bandwidth_low_gbs > out.bandwidth_high_gbs)
    problems.add(fields.field("bandwidth_low_gbs"), "is above bandwidth_high_gbs");
  if (const Json* tflops = fields.get("tflops", false)) {
    JsonFields rates(*tflops, fields.field("tflops"), problems);
    if (rates.is_object()) {
      for (const char* precision : kPrecisions)
        if (const double rate = number(rates, precision, 1e-3, 1e6, 0); rate > 0)
          out.tflops[precision] = rate;
      rates.refuse_unknown();
    }
  }
  fields.refuse_unknown();
  return out;
}

EngineFactors read_engine(const Json& json, Problems& problems) {
  JsonFields fields(json, "engine", problems);
  EngineFactors out;
  if (!fields.is_object()) return out;
  out.source = fields.text("source");
  out.composition_source = fields.text("composition_source", "");
  for (const auto& [key, share] :
       {std::pair("vision", &out.vision), std::pair("prefix", &out.prefix), std::pair("step", &out.step)})
    *share = number(fields, key, 0.001, 1);
  out.kernel_us = number(fields, "kernel_us", 0, 1e4, 0);
  out.kernels = fields.integer("kernels", 0, 1000, 0);
  out.phase_us = number(fields, "phase_us", 0, 1e4, 0);
  out.phases = fields.integer("phases", 0, 1000, 0);
  out.loop_requests = fields.integer("loop_requests", 1, 1024, 1024);
  out.composition_us = number(fields, "composition_us", 0, 1e6, 0);
  out.host_ms = number(fields, "host_ms", 0, 1e4, 0);
  fields.refuse_unknown();
  return out;
}

// What a lender was measured at, of what its datasheet says.
double sustained(const DeviceProfile& lender, const std::string& precision) {
  if (!lender.measured) return 1;
  const auto share = [&](const std::string& p) {
    const auto have = lender.measured->tflops.find(p), most = lender.datasheet.tflops.find(p);
    return have == lender.measured->tflops.end() || most == lender.datasheet.tflops.end()
               ? 0
               : have->second / most->second;
  };
  return share(precision) > 0 ? share(precision) : share("bf16") > 0 ? share("bf16") : 1;
}

// The planner's part of a machine profile (servoflow probe): the CPU, or the GPU if one was probed.
Result<DeviceProfile> from_probe(const Json& json, const std::string& where) {
  const auto bad = [&](const std::string& what) {
    return Status::invalid(
        where + ": " + what +
        "; a .json device is what `servoflow probe --json FILE` writes, else use a .toml file");
  };
  if (!json.is_object() || !json.contains("devices") || !json["devices"].is_array() ||
      json["devices"].empty())
    return bad("holds no `devices`");
  const Json* chosen = nullptr;
  for (const Json& d : json["devices"]) {
    if (!d.is_object() || !d.contains("device") || !d["device"].is_string())
      return bad("an entry of `devices` does not say which it is");
    if (chosen == nullptr || d["device"].get<std::string>() != "cpu") chosen = &d;
  }
  const auto text = [&](const char* key) {
    return chosen->contains(key) && (*chosen)[key].is_string() ? (*chosen)[key].get<std::string>() : "";
  };
  const auto median = [](const Json& m) {
    if (!m.is_object() || !m.contains("median") || !m["median"].is_number()) return 0.0;
    const double x = m["median"].get<double>();
    return std::isfinite(x) && x > 0 ? x : 0.0;
  };
  DeviceProfile out;
  out.name = text("device");
  out.title = text("name").empty() ? out.name : text("name");
  out.kind = out.name == "cpu" ? "cpu" : "gpu";
  out.borrow = out.kind == "cpu" ? "cpu" : "h200";
  if (chosen->contains("memory_bytes") && (*chosen)["memory_bytes"].is_number())
    out.memory_gb = (*chosen)["memory_bytes"].get<double>() / 1e9;
  DeviceRates rates{.source = where + ", measured by servoflow probe"};
  if (chosen->contains("bandwidth") && (*chosen)["bandwidth"].is_array())
    for (const Json& point : (*chosen)["bandwidth"]) {
      if (!point.is_object() || point.value("level", Json()) != Json("memory")) continue;
      // As the lenders' were measured: reads on a CPU, copies on a GPU.
      rates.bandwidth_gbs = std::max(
          rates.bandwidth_gbs, median(point.value(out.kind == "cpu" ? "read_gbs" : "copy_gbs", Json())));
    }
  // A CPU's factors are shares of its instruction peaks.
  const Json peaks = chosen->value("peaks", Json());
  const auto peak = [&](const char* key) {
    if (!peaks.is_object() || !peaks.contains(key) || !peaks[key].is_object()) return 0.0;
    const Json rate = peaks[key].value("all_threads", Json());
    return rate.is_number() && std::isfinite(rate.get<double>()) ? std::max(0.0, rate.get<double>()) : 0.0;
  };
  for (const auto& [precision, key] :
       {std::pair("bf16", "bf16_gflops"), std::pair("fp32", "fp32_gflops"), std::pair("int8", "int8_gops")})
    if (const double rate = peak(key); rate > 0) rates.tflops[precision] = rate / 1e3;
  if (rates.bandwidth_gbs <= 0) rates.bandwidth_gbs = peak("read_gbs");
  // A GPU's of its best product, whoever computed it.
  if (rates.tflops.empty() && chosen->contains("products") && (*chosen)["products"].is_array())
    for (const Json& p : (*chosen)["products"]) {
      if (!p.is_object()) continue;
      const double us = median(p.value("us", Json()));
      const bool sized = p.contains("m") && p.contains("n") && p.contains("k") && p["m"].is_number() &&
                         p["n"].is_number() && p["k"].is_number();
      if (us <= 0 || !sized || !p.contains("precision") || !p["precision"].is_string()) continue;
      const std::string precision = p["precision"];
      if (std::find(kPrecisions.begin(), kPrecisions.end(), precision) == kPrecisions.end()) continue;
      double& rate = rates.tflops[precision];
      rate = std::max(rate, 2e-6 * p["m"].get<double>() * p["n"].get<double>() * p["k"].get<double>() / us);
    }
  if (rates.bandwidth_gbs <= 0) return bad("device " + out.name + " has no bandwidth at level \"memory\"");
  if (rates.tflops.empty()) return bad("device " + out.name + " has no products");
  out.datasheet = rates;
  out.measured = rates;
  return out;
}

}  // namespace

Result<DeviceProfile> device_profile_from_json(const Json& json, const std::string& where) {
  Problems problems(where);
  JsonFields fields(json, "", problems);
  DeviceProfile out;
  if (!fields.is_object()) return problems.status();
  out.name = fields.text("name");
  out.title = fields.text("title");
  out.kind = fields.text("kind");
  if (out.kind != "gpu" && out.kind != "cpu" && json.contains("kind"))
    problems.add("kind", "must be \"gpu\" or \"cpu\", is \"" + out.kind + "\"");
  out.memory_gb = number(fields, "memory_gb", 0.01, 1e5);
  out.power_w = number(fields, "power_w", 0.1, 1e5, 0);
  out.one_launch = fields.boolean("one_launch", true);
  out.borrow = fields.text("borrow", "");
  if (const Json* rates = fields.get("datasheet", false))
    out.datasheet = read_rates(*rates, "datasheet", problems, true);
  if (const Json* rates = fields.get("measured", false))
    out.measured = read_rates(*rates, "measured", problems, false);
  if (const Json* engine = fields.get("engine", false)) out.engine = read_engine(*engine, problems);
  fields.refuse_unknown();
  if (!json.contains("datasheet") && !json.contains("measured"))
    problems.add("", "has neither [datasheet] nor [measured]: the planner needs rates from somewhere");
  const bool has_bandwidth =
      out.datasheet.bandwidth_gbs > 0 || (out.measured && out.measured->bandwidth_gbs > 0);
  if (problems.empty() && !has_bandwidth)
    problems.add("measured.bandwidth_gbs", "missing, and no [datasheet] has it");
  const auto knows = [&](const char* p) {
    return out.datasheet.tflops.count(p) > 0 || (out.measured && out.measured->tflops.count(p) > 0);
  };
  if (problems.empty() && !knows("bf16") && !knows("fp32"))
    problems.add("datasheet.tflops",
                 "needs bf16 or fp32: everything that is not quantized computes in one of them");
  if (!out.engine && out.borrow.empty())
    problems.add(
        "",
        "has no [engine] and no `borrow = \"h200\"` (or another profile's name) to take its factors from");
  SF_RETURN_IF_ERROR(problems.status());
  return out;
}

Result<DeviceProfile> parse_device_profile(std::string_view toml, const std::string& where) {
  SF_ASSIGN_OR_RETURN(const Json json, parse_toml(toml, where));
  return device_profile_from_json(json, where);
}

std::vector<std::string> list_device_profiles() {
  std::vector<std::string> names;
  for (const BuiltinProfile& p : builtin_profiles()) names.emplace_back(p.name);
  std::sort(names.begin(), names.end());
  return names;
}

Result<DeviceProfile> load_device_profile(const std::string& name_or_path) {
  for (const BuiltinProfile& p : builtin_profiles())
    if (p.name == name_or_path) return parse_device_profile(p.toml, "profile " + name_or_path);
  if (name_or_path.ends_with(".json")) {
    SF_ASSIGN_OR_RETURN(const Json json, read_json_file(name_or_path));
    return from_probe(json, name_or_path);
  }
  if (name_or_path.find('/') == std::string::npos && !name_or_path.ends_with(".toml"))
    return Status::invalid("device \"" + name_or_path + "\": no such profile; there are " +
                           contract::join(list_device_profiles()) +
                           ", files that end in .toml, and what `servoflow probe --json FILE.json` writes");
  SF_ASSIGN_OR_RETURN(const Json json, read_toml_file(name_or_path));
  return device_profile_from_json(json, name_or_path);
}

Result<UsedRates> used_rates(const DeviceProfile& p) {
  UsedRates out;
  std::optional<DeviceProfile> lender;
  if (!p.borrow.empty() && p.borrow != p.name) {
    SF_ASSIGN_OR_RETURN(lender, load_device_profile(p.borrow));
    if (!lender->engine)
      return Status::invalid("profile " + p.name + ": borrows from " + p.borrow + ", which has no [engine]");
  }
  // Another lender's probe of a CPU borrows from "cpu", which is its own name there.
  if (!lender && !p.engine && p.borrow == p.name) {
    SF_ASSIGN_OR_RETURN(lender, load_device_profile(p.borrow));
  }
  const bool has = p.measured && p.measured->bandwidth_gbs > 0;
  if (has) {
    out.bandwidth_gbs = p.measured->bandwidth_gbs;
    out.sources.push_back(fmt::format("bandwidth {:.4g} GB/s: {}", out.bandwidth_gbs, p.measured->source));
  } else {
    double share = 1;
    if (lender && lender->measured && lender->measured->bandwidth_gbs > 0 &&
        lender->datasheet.bandwidth_gbs > 0)
      share = lender->measured->bandwidth_gbs / lender->datasheet.bandwidth_gbs;
    out.bandwidth_gbs = p.datasheet.bandwidth_gbs * share;
    out.rates_borrowed = true;
    out.sources.push_back(fmt::format("bandwidth {:.4g} GB/s: {:.0f} % (as {} was measured at) of {:.4g}, {}",
                                      out.bandwidth_gbs, 100 * share, p.borrow, p.datasheet.bandwidth_gbs,
                                      p.datasheet.source));
  }
  for (const char* name : kPrecisions) {
    const std::string precision = name;
    if (p.measured && p.measured->tflops.count(precision) > 0) {
      out.tflops[precision] = p.measured->tflops.at(precision);
      out.sources.push_back(
          fmt::format("{} {:.4g} TFLOP/s: {}", precision, out.tflops[precision], p.measured->source));
    } else if (p.datasheet.tflops.count(precision) > 0) {
      const double most = p.datasheet.tflops.at(precision);
      const double share = sustained(lender ? *lender : p, precision);
      out.tflops[precision] = most * share;
      out.rates_borrowed = true;
      out.sources.push_back(fmt::format("{} {:.4g} TFLOP/s: {:.0f} % (as {} was measured at) of {:.4g}, {}",
                                        precision, out.tflops[precision], 100 * share,
                                        lender ? lender->name : p.name, most, p.datasheet.source));
    }
  }
  if (p.engine) {
    out.engine = *p.engine;
  } else if (lender && lender->engine) {
    out.engine = *lender->engine;
    out.engine_borrowed = true;
  } else {
    return Status::invalid("profile " + p.name + ": nothing says how much of its rates the engine reaches");
  }
  if (!p.one_launch) out.engine.loop_requests = 0;
  out.sources.push_back(fmt::format("engine: fitted on {}{}", out.engine.source,
                                    out.engine_borrowed ? ", another device: a guess here" : ""));
  return out;
}

}  // namespace servoflow::toolkit
