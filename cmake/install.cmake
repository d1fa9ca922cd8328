# What `make install` lays down, and where the binary ends up in a build folder. Included last, when all targets exist.
#
# The library is one archive, libservoflow.a, made of the objects of sf_capi and of every unit below it: users link
# one file, and our unit names stay out of their way. What it needs from outside (dep_*, Threads, OpenMP) is collected
# from the same walk and written into the CMake package and the pkg-config file, so neither can fall behind. Beside it
# lies libservoflow_c.so, which shows the C interface and nothing else: for C programs that must not be linked anew with
# every release, and for languages that load libraries.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

if(TARGET servoflow)
  set_target_properties(servoflow PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR})
  if(SF_STATIC)
    set_target_properties(servoflow PROPERTIES BUILD_RPATH "$ORIGIN/lib" INSTALL_RPATH "$ORIGIN/lib")
    add_custom_target(servoflow_bundle ALL VERBATIM
      COMMAND ${CMAKE_COMMAND} -DBINARY=$<TARGET_FILE:servoflow> -DFOLDER=${CMAKE_BINARY_DIR}/lib
              -P ${CMAKE_SOURCE_DIR}/cmake/bundle.cmake)
    add_dependencies(servoflow_bundle servoflow)
    install(DIRECTORY ${CMAKE_BINARY_DIR}/lib DESTINATION ${CMAKE_INSTALL_BINDIR})
  endif()
  install(TARGETS servoflow RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
install(DIRECTORY ${CMAKE_SOURCE_DIR}/include/servoflow DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(EXISTS ${CMAKE_SOURCE_DIR}/robots)
  install(DIRECTORY ${CMAKE_SOURCE_DIR}/robots DESTINATION ${CMAKE_INSTALL_DATADIR}/servoflow)
endif()
install(FILES ${CMAKE_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

# sf_walk(item): appends to the global properties SF_OBJECTS (units of ours) and SF_LIBRARIES (files and names of others),
# depth first.
function(sf_walk item)
  string(REGEX REPLACE "^\\$<LINK_ONLY:(.*)>$" "\\1" item "${item}")
  get_property(seen GLOBAL PROPERTY SF_WALKED)
  if(item STREQUAL "sf_flags" OR item MATCHES "^\\$<|^::@" OR item IN_LIST seen)
    return()
  endif()
  set_property(GLOBAL APPEND PROPERTY SF_WALKED ${item})
  if(NOT TARGET ${item})
    set_property(GLOBAL APPEND PROPERTY SF_LIBRARIES ${item})
    return()
  endif()
  get_target_property(type ${item} TYPE)
  set(property INTERFACE_LINK_LIBRARIES)
  if(type MATCHES "^(STATIC|OBJECT)_LIBRARY$")
    get_target_property(imported ${item} IMPORTED)
    if(NOT imported)
      # A unit may contain objects of others (the CUDA kernels), which are not among its own.
      get_target_property(contained ${item} SOURCES)
      list(FILTER contained INCLUDE REGEX "^\\$<TARGET_OBJECTS:")
      set_property(GLOBAL APPEND PROPERTY SF_OBJECTS $<TARGET_OBJECTS:${item}> ${contained})
      set(property LINK_LIBRARIES)
    endif()
  endif()
  if(item MATCHES "::" AND NOT type STREQUAL "INTERFACE_LIBRARY")
    get_target_property(location ${item} LOCATION)
    set_property(GLOBAL APPEND PROPERTY SF_LIBRARIES ${location})
  elseif(item STREQUAL "Threads::Threads")
    set_property(GLOBAL APPEND PROPERTY SF_LIBRARIES pthread)
  endif()
  get_target_property(links ${item} ${property})
  if(links)
    foreach(link IN LISTS links)
      sf_walk(${link})
    endforeach()
  endif()
endfunction()

if(TARGET sf_capi AND NOT SF_SANITIZE)
  sf_walk(sf_capi)
  get_property(objects GLOBAL PROPERTY SF_OBJECTS)
  get_property(libraries GLOBAL PROPERTY SF_LIBRARIES)
  add_library(servoflow_archive STATIC ${objects})
  set_target_properties(servoflow_archive PROPERTIES OUTPUT_NAME servoflow LINKER_LANGUAGE CXX
    ARCHIVE_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR})

  # Debian's archives of other libraries are not made for shared objects, so SF_STATIC goes without.
  set(SF_PACKAGES servoflow)
  if(NOT SF_STATIC)
    list(APPEND SF_PACKAGES servoflow_c)
    file(STRINGS ${CMAKE_SOURCE_DIR}/include/servoflow/servoflow.h SF_ABI_VERSION REGEX "define SERVOFLOW_ABI_VERSION")
    string(REGEX REPLACE "[^0-9]" "" SF_ABI_VERSION "${SF_ABI_VERSION}")
    add_library(servoflow_c SHARED $<TARGET_OBJECTS:sf_capi>)
    target_link_libraries(servoflow_c PRIVATE sf_policy sf_flags)
    set(exports ${CMAKE_SOURCE_DIR}/cmake/servoflow_c.map)
    target_link_options(servoflow_c PRIVATE -Wl,--version-script=${exports} -Wl,--no-undefined)
    set_target_properties(servoflow_c PROPERTIES LINKER_LANGUAGE CXX LINK_DEPENDS ${exports} VERSION ${PROJECT_VERSION}
      SOVERSION ${SF_ABI_VERSION} LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR})
    install(TARGETS servoflow_c LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  endif()

  # "/usr/lib/x86_64-linux-gnu/libfmt.so" and "fmt" both become the name fmt; folders the linker does not search by
  # itself are kept for -L.
  set(SF_PACKAGE_NAMES "")
  set(SF_PACKAGE_FOLDERS "")
  foreach(library IN LISTS libraries)
    get_filename_component(file ${library} NAME)
    string(REGEX REPLACE "^(-l|lib)|\\.(so|a)[0-9.]*$" "" name ${file})
    list(APPEND SF_PACKAGE_NAMES ${name})
    if(IS_ABSOLUTE ${library})
      get_filename_component(folder ${library} DIRECTORY)
      if(NOT folder IN_LIST CMAKE_CXX_IMPLICIT_LINK_DIRECTORIES)
        list(APPEND SF_PACKAGE_FOLDERS ${folder})
      endif()
    endif()
  endforeach()
  list(REMOVE_DUPLICATES SF_PACKAGE_NAMES)
  list(REMOVE_DUPLICATES SF_PACKAGE_FOLDERS)
  set(SF_PKGCONFIG_LIBS "")
  foreach(folder IN LISTS SF_PACKAGE_FOLDERS)
    string(APPEND SF_PKGCONFIG_LIBS " -L${folder}")
  endforeach()
  foreach(name IN LISTS SF_PACKAGE_NAMES)
    string(APPEND SF_PKGCONFIG_LIBS " -l${name}")
  endforeach()

  file(RELATIVE_PATH SF_PKGCONFIG_PREFIX /p/${CMAKE_INSTALL_LIBDIR}/pkgconfig /p)
  set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/servoflow)
  configure_package_config_file(${CMAKE_SOURCE_DIR}/cmake/servoflowConfig.cmake.in
    ${CMAKE_BINARY_DIR}/servoflowConfig.cmake INSTALL_DESTINATION ${package_folder} NO_SET_AND_CHECK_MACRO)
  write_basic_package_version_file(${CMAKE_BINARY_DIR}/servoflowConfigVersion.cmake COMPATIBILITY SameMinorVersion)
  foreach(name IN LISTS SF_PACKAGES)
    configure_file(${CMAKE_SOURCE_DIR}/cmake/${name}.pc.in ${CMAKE_BINARY_DIR}/${name}.pc @ONLY)
    install(FILES ${CMAKE_BINARY_DIR}/${name}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
  endforeach()
  install(TARGETS servoflow_archive ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(FILES ${CMAKE_BINARY_DIR}/servoflowConfig.cmake ${CMAKE_BINARY_DIR}/servoflowConfigVersion.cmake
    DESTINATION ${package_folder})
endif()
