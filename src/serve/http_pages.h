// What the server answers over plain HTTP: health, metrics, and who may open a websocket.
#pragma once

#include <optional>
#include <string>

#include "serve/context.h"

namespace servoflow::serve {

struct PageRequest {
  std::string method, target, authorization;
  bool is_upgrade = false;
};

struct Page {
  int status = 200;  // 101: go on with the websocket's handshake; one of the places for robots is taken then
  std::string body;
  std::string content_type = "text/plain; charset=utf-8";
  std::optional<Cause> cause;  // why it is a refusal
  bool holds_place = false;
};

Page answer_http(const PageRequest& request, Context& context);

}  // namespace servoflow::serve
