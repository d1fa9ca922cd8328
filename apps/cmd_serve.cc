#include <fmt/format.h>

#include <cstdio>
#include <memory>

#include "commands.h"
#include "core/file.h"
#include "core/status_macros.h"
#include "serve/server.h"
#include "toolkit/machine.h"

namespace servoflow::cli {
namespace {

struct Options {
  CommonOptions common;
  serve::ServeOptions serve;
  std::string metadata;
  double max_message_mb = 64;
};

Status serve_robots(Options& o) {
  SF_RETURN_IF_ERROR(apply_machine_profile(o.common, o.serve.checkpoint).status());
  o.serve.policy = policy_options(o.common);
  o.serve.log_level = o.common.log_level;
  o.serve.max_message_bytes = static_cast<std::size_t>(o.max_message_mb * (1 << 20));
  o.serve.version = toolkit::build_json()["version"].get<std::string>();
  if (!o.metadata.empty()) {
    SF_ASSIGN_OR_RETURN(const std::vector<std::uint8_t> file,
                        read_binary_file(o.metadata, std::size_t{1} << 20));
    SF_ASSIGN_OR_RETURN(const Json json, parse_json({reinterpret_cast<const char*>(file.data()), file.size()},
                                                    "--metadata " + o.metadata));
    o.serve.metadata_json = json.dump();
  }
  return serve::serve(o.serve, [](const std::string& url) {
    fmt::print("{}\n", url);
    std::fflush(stdout);
  });
}

}  // namespace

void add_serve(CLI::App& app, Action& action) {
  auto o = std::make_shared<Options>();
  serve::ServeOptions& s = o->serve;
  CLI::App* sub = app.add_subcommand("serve", "Answer robots over openpi's websocket protocol");
  sub->add_option("CHECKPOINT", s.checkpoint, "Checkpoint directory")->required();
  sub->add_option("--robot", s.robot, "Built-in robot or contract file; default: the checkpoint's own")
      ->type_name("R");
  sub->add_option("--host", s.host, "Address to listen on; 0.0.0.0 is every network")
      ->type_name("ADDRESS")
      ->capture_default_str();
  const auto number = [sub](const char* name, auto& value, double low, double high, const char* help) {
    sub->add_option(name, value, help)
        ->check(CLI::Range(low, high).description(""))
        ->type_name("N")
        ->capture_default_str();
  };
  number("--port", s.port, 0, 65535, "Port to listen on; 0 is any free one");
  add_seed_option(*sub, s.seed, "Seed of every connection's noise");
  number("--max-batch", s.max_batch, 0, 64,
         "Most robots computed together, per device; 0 is 4 on a GPU, 1 on a CPU");
  number("--prompt-tokens", s.policy.prompt_tokens, 0, 4096,
         "Tokens of a prompt to expect: a GPU shapes its work for them and takes any number; 0 is as many as "
         "fit");
  number("--max-wait-ms", s.max_wait_ms, 0, 1000, "How long a request waits for others to join");
  number("--max-connections", s.max_connections, 1, 4096, "Robots at once; more get 503");
  number("--queue", s.queue, 1, 65536, "Requests waiting; more get close 1013");
  number("--max-outstanding", s.max_outstanding, 1, 1024, "Unanswered requests of one connection");
  number("--max-rate", s.max_rate, 0, 1e6, "Requests a second of one connection; 0 is any");
  number("--max-message-mb", o->max_message_mb, 0.001, 1024, "Size of one message, MiB");
  number("--idle-s", s.idle_seconds, 1, 86400, "Silence, pings included, after which a robot is gone");
  number("--io-threads", s.io_threads, 1, 64, "Threads for the network");
  sub->add_option("--api-keys", s.api_keys, "File of keys, one a line; also $SERVOFLOW_API_KEY")
      ->type_name("FILE");
  sub->add_option("--cert", s.cert, "TLS: certificate chain")->type_name("FILE.pem");
  sub->add_option("--key", s.key, "TLS: private key")->type_name("FILE.pem");
  sub->add_option("--metadata", o->metadata, "JSON object that joins the metadata sent on connect")
      ->type_name("FILE.json");
  sub->add_option("--record", s.record, "Write every request as a case for `servoflow verify`")
      ->type_name("DIR");
  sub->add_option("--record-limit", s.record_limit, "Most cases to write")
      ->type_name("N")
      ->capture_default_str();
  add_device_options(*sub, o->common, "auto");
  add_profile_option(*sub, o->common);
  add_checkpoint_options(*sub, o->common);
  add_log_option(*sub, o->common);
  add_examples(*sub, "servoflow serve tests/golden/openpi-tiny --robot libero",
               "servoflow serve tests/golden/openpi-tiny --robot droid --port 9000 --max-batch 16 --record "
               "build/requests");
  sub->callback([o, &action] { action = [o] { return serve_robots(*o); }; });
}

}  // namespace servoflow::cli
