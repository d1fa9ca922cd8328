#include "serve/http_pages.h"

namespace servoflow::serve {
namespace {

Page open_websocket(const PageRequest& request, Context& context) {
  if (context.draining)
    return {.status = 503, .body = "the server is shutting down\n", .cause = Cause::kShutdown};
  if (!context.keys.admits(request.authorization))
    return {.status = 401,
            .body = "Authorization: expected \"Api-Key KEY\" with a known key\n",
            .cause = Cause::kUnauthorized};
  if (context.robots.fetch_add(1) >= context.options.max_connections) {
    --context.robots;
    return {.status = 503,
            .body = "connections: all " + std::to_string(context.options.max_connections) +
                    " places are taken (--max-connections)\n",
            .cause = Cause::kConnections};
  }
  return {.status = 101, .holds_place = true};
}

std::string info_labels(const Context& context) {
  const auto host = context.host();
  const PolicyInfo& info = host->info();
  return "version=\"" + escape_label(context.options.version) + "\",checkpoint=\"" +
         escape_label(info.checkpoint) + "\",robot=\"" + escape_label(host->schema()->robot) +
         "\",contract_hash=\"" + host->contract_hash() + "\",device=\"" + escape_label(info.device) +
         "\",backend=\"" + escape_label(info.backend) + "\",precision=\"" + escape_label(info.precision) +
         "\"";
}

}  // namespace

Page answer_http(const PageRequest& request, Context& context) {
  if (request.is_upgrade) return open_websocket(request, context);  // on any path
  const std::string path = request.target.substr(0, request.target.find('?'));
  const bool reads = request.method == "GET" || request.method == "HEAD";
  if (path == "/healthz" && reads) {
    if (context.draining) return {.status = 503, .body = "shutting down\n"};
    return {.body = "OK\n"};
  }
  if (path == "/metrics" && reads) {
    if (!context.keys.admits(request.authorization))
      return {.status = 401,
              .body = "Authorization: expected \"Api-Key KEY\" with a known key\n",
              .cause = Cause::kUnauthorized};
    return {.body = context.metrics.text(info_labels(context)),
            .content_type = "text/plain; version=0.0.4; charset=utf-8"};
  }
  if (path == "/healthz" || path == "/metrics") return {.status = 405, .body = "only GET\n"};
  return {.status = 426, .body = "This is a websocket server for robots; see also /healthz and /metrics.\n"};
}

}  // namespace servoflow::serve
