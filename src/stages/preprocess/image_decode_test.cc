#include "stages/preprocess/image_decode.h"

#include <gtest/gtest.h>
#include <jpeglib.h>
#include <png.h>
#include <zlib.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

namespace servoflow::stages {
namespace {

using Bytes = std::vector<std::uint8_t>;

struct PngPicture {
  png_uint_32 width = 2, height = 1;
  int color = PNG_COLOR_TYPE_RGB, depth = 8, interlace = PNG_INTERLACE_NONE;
  std::vector<Bytes> rows;
  std::vector<png_color> palette;
  Bytes alpha;
};

Bytes encode_png(PngPicture p) {
  Bytes out;
  png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
  png_infop info = png_create_info_struct(png);
  png_set_write_fn(
      png, &out,
      [](png_structp s, png_bytep data, png_size_t n) {
        auto* o = static_cast<Bytes*>(png_get_io_ptr(s));
        o->insert(o->end(), data, data + n);
      },
      nullptr);
  png_set_IHDR(png, info, p.width, p.height, p.depth, p.color, p.interlace, PNG_COMPRESSION_TYPE_DEFAULT,
               PNG_FILTER_TYPE_DEFAULT);
  if (!p.palette.empty()) png_set_PLTE(png, info, p.palette.data(), static_cast<int>(p.palette.size()));
  if (!p.alpha.empty()) png_set_tRNS(png, info, p.alpha.data(), static_cast<int>(p.alpha.size()), nullptr);
  std::vector<png_bytep> rows;
  for (Bytes& row : p.rows) rows.push_back(row.data());
  png_set_rows(png, info, rows.data());
  png_write_png(png, info, PNG_TRANSFORM_IDENTITY, nullptr);
  png_destroy_write_struct(&png, &info);
  return out;
}

Bytes encode_jpeg(int width, int height, int components, const Bytes& pixels, bool progressive = false) {
  jpeg_compress_struct jpeg;
  jpeg_error_mgr errors;
  jpeg.err = jpeg_std_error(&errors);
  jpeg_create_compress(&jpeg);
  unsigned char* memory = nullptr;
  unsigned long size = 0;
  jpeg_mem_dest(&jpeg, &memory, &size);
  jpeg.image_width = width;
  jpeg.image_height = height;
  jpeg.input_components = components;
  jpeg.in_color_space = components == 1 ? JCS_GRAYSCALE : components == 3 ? JCS_RGB : JCS_CMYK;
  jpeg_set_defaults(&jpeg);
  jpeg_set_quality(&jpeg, 95, TRUE);
  if (progressive) jpeg_simple_progression(&jpeg);
  jpeg_start_compress(&jpeg, TRUE);
  while (jpeg.next_scanline < jpeg.image_height) {
    auto* row =
        const_cast<std::uint8_t*>(pixels.data()) + std::size_t{1} * jpeg.next_scanline * width * components;
    jpeg_write_scanlines(&jpeg, &row, 1);
  }
  jpeg_finish_compress(&jpeg);
  Bytes out(memory, memory + size);
  jpeg_destroy_compress(&jpeg);
  std::free(memory);
  return out;
}

Bytes decoded(const Bytes& file) {
  Image image;
  const Status status = decode_image(file, image);
  EXPECT_TRUE(status.ok()) << status.message();
  return image.rgb;
}

TEST(Png, EveryPixelFormatBecomesRgb) {
  EXPECT_EQ(decoded(encode_png({.rows = {{1, 2, 3, 4, 5, 6}}})), (Bytes{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(decoded(encode_png({.color = PNG_COLOR_TYPE_GRAY, .rows = {{7, 200}}})),
            (Bytes{7, 7, 7, 200, 200, 200}));
  EXPECT_EQ(decoded(encode_png({.color = PNG_COLOR_TYPE_GRAY, .depth = 1, .rows = {{0x40}}})),
            (Bytes{0, 0, 0, 255, 255, 255}));
  EXPECT_EQ(decoded(encode_png({.color = PNG_COLOR_TYPE_GRAY, .depth = 2, .rows = {{0x60}}})),
            (Bytes{85, 85, 85, 170, 170, 170}));
  EXPECT_EQ(decoded(encode_png({.color = PNG_COLOR_TYPE_GRAY_ALPHA, .rows = {{7, 0, 200, 9}}})),
            (Bytes{7, 7, 7, 200, 200, 200}));
  // Alpha is dropped, not composited: transparent pixels keep their color.
  EXPECT_EQ(decoded(encode_png({.color = PNG_COLOR_TYPE_RGB_ALPHA, .rows = {{1, 2, 3, 0, 4, 5, 6, 128}}})),
            (Bytes{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(decoded(encode_png({.depth = 16, .rows = {{1, 255, 2, 255, 3, 255, 4, 0, 5, 0, 6, 0}}})),
            (Bytes{1, 2, 3, 4, 5, 6}));
  const std::vector<png_color> palette{{10, 20, 30}, {40, 50, 60}, {70, 80, 90}};
  EXPECT_EQ(decoded(encode_png({.color = PNG_COLOR_TYPE_PALETTE, .rows = {{2, 0}}, .palette = palette})),
            (Bytes{70, 80, 90, 10, 20, 30}));
  EXPECT_EQ(decoded(encode_png({.color = PNG_COLOR_TYPE_PALETTE,
                                .depth = 4,
                                .rows = {{0x12}},
                                .palette = palette,
                                .alpha = {0, 5}})),
            (Bytes{40, 50, 60, 70, 80, 90}));
}

TEST(Png, InterlacedEqualsPlain) {
  PngPicture picture{.width = 13, .height = 9};
  Bytes flat;
  for (int y = 0; y < 9; ++y) {
    Bytes row;
    for (int x = 0; x < 39; ++x) row.push_back(static_cast<std::uint8_t>(y * 39 + x));
    flat.insert(flat.end(), row.begin(), row.end());
    picture.rows.push_back(row);
  }
  EXPECT_EQ(decoded(encode_png(picture)), flat);
  picture.interlace = PNG_INTERLACE_ADAM7;
  EXPECT_EQ(decoded(encode_png(picture)), flat);
}

TEST(Jpeg, ColorsSurvive) {
  Bytes pixels(3 * 32 * 24);
  for (int i = 0; i < 32 * 24; ++i) {
    pixels[3 * i] = 200;
    pixels[3 * i + 1] = static_cast<std::uint8_t>(i % 32 * 4);
    pixels[3 * i + 2] = 30;
  }
  for (const bool progressive : {false, true}) {
    Image image;
    ASSERT_TRUE(decode_image(encode_jpeg(32, 24, 3, pixels, progressive), image).ok());
    EXPECT_EQ(image.width, 32);
    EXPECT_EQ(image.height, 24);
    ASSERT_EQ(image.rgb.size(), pixels.size());
    double error = 0;
    for (std::size_t i = 0; i < pixels.size(); ++i) error += std::abs(int{pixels[i]} - int{image.rgb[i]});
    EXPECT_LT(error / static_cast<double>(pixels.size()), 4);
  }
  const Bytes gray = decoded(encode_jpeg(8, 8, 1, Bytes(64, 100)));
  EXPECT_EQ(gray, Bytes(192, 100));
  Image image;
  const Status cmyk = decode_image(encode_jpeg(8, 8, 4, Bytes(256, 100)), image);
  ASSERT_FALSE(cmyk.ok());
  EXPECT_NE(cmyk.message().find("CMYK"), std::string::npos);
}

TEST(Jpeg, AScanBombIsRefused) {
  // The same progressive scan a thousand times over: small file, endless work.
  const Bytes good = encode_jpeg(64, 64, 3, Bytes(3 * 64 * 64, 77), true);
  std::size_t last = 0;
  for (std::size_t i = 0; i + 1 < good.size(); ++i) {
    if (good[i] == 0xff && good[i + 1] == 0xda) last = i;
  }
  ASSERT_GT(last, 0u);
  Bytes bomb(good.begin(), good.end() - 2);
  for (int i = 0; i < 1000; ++i)
    bomb.insert(bomb.end(), good.begin() + static_cast<long>(last), good.end() - 2);
  bomb.insert(bomb.end(), {0xff, 0xd9});
  Image image;
  EXPECT_FALSE(decode_image(bomb, image).ok());
}

TEST(Decode, TruncatedFilesAreErrors) {
  PngPicture picture{.width = 40, .height = 40};
  std::mt19937 random(1);
  Bytes pixels;
  for (int y = 0; y < 40; ++y) {
    Bytes row(120);
    for (auto& byte : row) byte = static_cast<std::uint8_t>(random());
    pixels.insert(pixels.end(), row.begin(), row.end());
    picture.rows.push_back(row);
  }
  for (const Bytes& file :
       {encode_png(picture), encode_jpeg(40, 40, 3, pixels), encode_jpeg(40, 40, 3, pixels, true)}) {
    Image image;
    ASSERT_TRUE(decode_image(file, image).ok());
    for (std::size_t size = 0; size + 2 < file.size(); size += 1 + size / 50) {
      const Status status = decode_image(std::span(file).first(size), image);
      EXPECT_EQ(status.code(), StatusCode::kInvalidInput) << size << " of " << file.size();
    }
  }
}

TEST(Decode, SizeBombsTakeNoMemory) {
  Bytes png = encode_png({.rows = {{1, 2, 3, 4, 5, 6}}});
  const auto resized = [&](std::uint32_t width, std::uint32_t height) {
    Bytes file = png;
    for (int i = 0; i < 4; ++i) {
      file[16 + i] = static_cast<std::uint8_t>(width >> (24 - 8 * i));
      file[20 + i] = static_cast<std::uint8_t>(height >> (24 - 8 * i));
    }
    const std::uint32_t crc = static_cast<std::uint32_t>(crc32(0, file.data() + 12, 17));
    for (int i = 0; i < 4; ++i) file[29 + i] = static_cast<std::uint8_t>(crc >> (24 - 8 * i));
    return file;
  };
  for (const auto& [width, height] : std::vector<std::pair<std::uint32_t, std::uint32_t>>{
           {16385, 1}, {1, 16385}, {16384, 16384}, {0x7fffffff, 0x7fffffff}, {0, 5}, {0xffffffff, 1}}) {
    Image image;
    EXPECT_FALSE(decode_image(resized(width, height), image).ok()) << width << "x" << height;
    EXPECT_LT(image.rgb.capacity(), 1000u);
  }
  Bytes jpeg = encode_jpeg(8, 8, 3, Bytes(192, 5));
  for (std::size_t i = 0; i + 9 < jpeg.size(); ++i) {
    if (jpeg[i] == 0xff && jpeg[i + 1] == 0xc0) jpeg[i + 5] = jpeg[i + 7] = 0xff;  // 65288 x 65288
  }
  Image image;
  EXPECT_FALSE(decode_image(jpeg, image).ok());
  EXPECT_LT(image.rgb.capacity(), 1000u);
}

TEST(Decode, SurvivesDamage) {
  PngPicture picture{.width = 40, .height = 30, .interlace = PNG_INTERLACE_ADAM7};
  for (int y = 0; y < 30; ++y) picture.rows.emplace_back(120, static_cast<std::uint8_t>(y * 8));
  std::mt19937 random(2);
  Image image;
  for (const Bytes& good : {encode_png(picture), encode_jpeg(40, 30, 3, Bytes(3600, 90)),
                            encode_jpeg(40, 30, 3, Bytes(3600, 90), true)}) {
    for (int round = 0; round < 3000; ++round) {
      Bytes file = good;
      for (int i = 0; i < 1 + round % 6; ++i)
        file[random() % file.size()] = static_cast<std::uint8_t>(random());
      const Status status = decode_image(file, image);
      EXPECT_TRUE(status.ok() || !status.message().empty());
    }
  }
}

TEST(Decode, NamesTheFile) {
  EXPECT_NE(read_image_file("README.none").status().message().find("README.none"), std::string::npos);
  const Status text = read_image_file("CMakeLists.txt").status();
  EXPECT_NE(text.message().find("CMakeLists.txt"), std::string::npos);
  EXPECT_NE(text.message().find("neither a PNG nor a JPEG"), std::string::npos);
  EXPECT_FALSE(read_image_file("tests").ok());
  Image image;
  EXPECT_FALSE(decode_image({}, image).ok());
}

}  // namespace
}  // namespace servoflow::stages
