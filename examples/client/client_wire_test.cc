#include "client_wire.h"

#include <gtest/gtest.h>

#include <cstring>
#include <msgpack.hpp>
#include <random>

namespace robot {
namespace {

struct Reply {
  std::string dtype = "<f8";
  std::vector<std::uint64_t> shape = {2, 3};
  std::string data = std::string(48, '\0');
  std::string key = "actions";
  bool text_markers = false;

  std::string bytes() const {
    msgpack::sbuffer buffer;
    msgpack::packer<msgpack::sbuffer> pack(buffer);
    const auto marker = [&](const std::string& name) {
      if (text_markers) {
        pack.pack(name);
      } else {
        pack.pack_bin(static_cast<std::uint32_t>(name.size()));
        pack.pack_bin_body(name.data(), static_cast<std::uint32_t>(name.size()));
      }
    };
    pack.pack_map(2);
    pack.pack("server_timing");
    pack.pack_map(1);
    pack.pack("infer_ms");
    pack.pack(1.5);
    pack.pack(key);
    pack.pack_map(4);
    marker("__ndarray__");
    pack.pack(true);
    marker("data");
    pack.pack_bin(static_cast<std::uint32_t>(data.size()));
    pack.pack_bin_body(data.data(), static_cast<std::uint32_t>(data.size()));
    marker("dtype");
    pack.pack(dtype);
    marker("shape");
    pack.pack(shape);
    return {buffer.data(), buffer.size()};
  }
};

template <class T>
std::string raw(const std::vector<T>& values) {
  std::string out(values.size() * sizeof(T), '\0');
  std::memcpy(out.data(), values.data(), out.size());
  return out;
}

std::string refusal(const std::string& message) {
  try {
    decode_actions(message);
  } catch (const BadReply& error) {
    return error.what();
  }
  return "accepted";
}

TEST(ClientWire, ReadsActions) {
  Reply reply;
  reply.data = raw<double>({1, 2, 3, 4, 5, 0.1});
  for (bool text : {false, true}) {
    reply.text_markers = text;
    const Actions actions = decode_actions(reply.bytes());
    EXPECT_EQ(actions.horizon, 2u);
    EXPECT_EQ(actions.dim, 3u);
    EXPECT_EQ(actions.values, (std::vector<double>{1, 2, 3, 4, 5, 0.1}));
  }
  reply.dtype = "<f4";
  reply.data = raw<float>({1, 2, 3, 4, 5, 0.1f});
  EXPECT_EQ(decode_actions(reply.bytes()).values.back(), static_cast<double>(0.1f));
}

TEST(ClientWire, NamesWhatIsWrong) {
  const auto with = [](auto change) {
    Reply reply;
    change(reply);
    return refusal(reply.bytes());
  };
  EXPECT_EQ(with([](Reply& r) { r.key = "acts"; }), "the reply has no actions");
  EXPECT_EQ(with([](Reply& r) { r.dtype = "|O"; }), "actions: the dtype is neither <f8 nor <f4");
  EXPECT_EQ(with([](Reply& r) { r.shape = {6}; }), "actions: the shape is not [horizon, columns]");
  EXPECT_EQ(with([](Reply& r) { r.data.pop_back(); }), "actions: 47 bytes of data; the shape needs 48");
  const std::string side = "actions: a side of the shape is not between 1 and 1048576";
  EXPECT_EQ(with([](Reply& r) { r.shape = {0, 3}; }), side);
  EXPECT_EQ(with([](Reply& r) { r.shape = {std::uint64_t{1} << 63, 2}; }), side);
  EXPECT_EQ(refusal("\x93\x01\x02\x03"), "the reply is not a map");
  EXPECT_EQ(refusal(Reply{}.bytes() + "x"), "the reply goes on behind its end");
  EXPECT_EQ(refusal(std::string("\x81\xa7"
                                "actions\x05")),
            "actions: not an array");
}

TEST(ClientWire, AnnouncedSizesAreNotAllocated) {
  for (const char* message :
       {"\xdf\xff\xff\xff\xff", "\x81\xa1z\xdd\xff\xff\xff\xff", "\x81\xa1z\xc6\xff\xff\xff\xff"})
    EXPECT_NE(refusal(message).find("not msgpack"), std::string::npos);
  std::string deep = "\x81\xa1z";
  deep.append(100000, '\x91');
  EXPECT_NE(refusal(deep + "\xc0").find("not msgpack"), std::string::npos);
  EXPECT_NE(refusal("").find("not msgpack"), std::string::npos);
}

TEST(ClientWire, DamagedRepliesAreRefusedOrRead) {
  std::mt19937 random(1);
  const std::string good = Reply{}.bytes();
  for (std::size_t size = 0; size < good.size(); ++size) EXPECT_NE(refusal(good.substr(0, size)), "accepted");
  for (int i = 0; i < 50000; ++i) {
    std::string bad = good;
    for (unsigned n = 1 + random() % 3; n > 0; --n) bad[random() % bad.size()] = static_cast<char>(random());
    try {
      const Actions actions = decode_actions(bad);
      ASSERT_EQ(actions.values.size(), actions.horizon * actions.dim);
    } catch (const BadReply&) {
    }
  }
}

TEST(ClientWire, WritesWhatPythonWrites) {
  Observation observation;
  observation.fields["prompt"] = "go";
  observation.fields["num_steps"] = std::int64_t{4};
  observation.fields["state"] = Array<double>{{2}, {0.5, -1}};
  observation.images["cam"] = Array<std::uint8_t>{{1, 1, 3}, {1, 2, 3}};
  const std::string bytes = encode(observation);
  const msgpack::object_handle handle = msgpack::unpack(bytes.data(), bytes.size());
  ASSERT_EQ(handle.get().type, msgpack::type::MAP);
  ASSERT_EQ(handle.get().via.map.size, 4u);
  const std::string array(
      "\x84\xc4\x0b__ndarray__\xc3\xc4\x04"
      "data\xc4\x03\x01\x02\x03\xc4\x05"
      "dtype\xa3|u1\xc4\x05shape\x93");
  EXPECT_NE(bytes.find("\xa3"
                       "cam" +
                       array),
            std::string::npos);
  EXPECT_NE(bytes.find(raw<double>({0.5, -1})), std::string::npos);
}

TEST(ClientWire, ArraysMustFillTheirShape) {
  const auto encoded = [](std::vector<std::size_t> shape, std::size_t count) {
    Observation observation;
    observation.fields["state"] = Array<double>{std::move(shape), std::vector<double>(count)};
    return encode(observation);
  };
  EXPECT_NO_THROW(encoded({2, 3}, 6));
  EXPECT_THROW(encoded({2, 3}, 5), std::invalid_argument);
  EXPECT_THROW(encoded({0}, 0), std::invalid_argument);
  EXPECT_THROW(encoded({std::size_t{1} << 63, 2}, 0), std::invalid_argument);
}

TEST(ClientWire, MetadataAndText) {
  const auto metadata = decode_metadata(
      "\x83\xa5robot\xa6libero\xae"
      "action_horizon\x0a\xa1z\xc0");
  EXPECT_EQ(metadata.at("robot"), "libero");
  EXPECT_EQ(metadata.at("action_horizon"), "10");
  EXPECT_EQ(metadata.size(), 2u);
  EXPECT_THROW(decode_metadata("\xc0"), BadReply);
  EXPECT_EQ(printable("a\nb\x1b"), "a b ");
  EXPECT_EQ(printable(std::string(1000, 'x')).size(), 306u);
}

}  // namespace
}  // namespace robot
