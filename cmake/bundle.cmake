# cmake -DBINARY=… -DFOLDER=… -P bundle.cmake: copies the shared objects that BINARY needs, beyond the C and C++ run
# time, into FOLDER under the names it asks for.
file(REMOVE_RECURSE ${FOLDER})
file(MAKE_DIRECTORY ${FOLDER})
file(GET_RUNTIME_DEPENDENCIES EXECUTABLES ${BINARY} RESOLVED_DEPENDENCIES_VAR found UNRESOLVED_DEPENDENCIES_VAR missing
  PRE_EXCLUDE_REGEXES "^(linux-vdso|ld-linux.*|libc|libm|libstdc\\+\\+|libgcc_s|libgomp|libdl|libpthread|librt)\\.so")
if(missing)
  message(FATAL_ERROR "${BINARY} needs ${missing}, which are not on this machine")
endif()
foreach(library IN LISTS found)
  # `library` is named as the binary asks for it (libhwy.so.1); its content is what the link points to.
  get_filename_component(name ${library} NAME)
  file(REAL_PATH ${library} content)
  configure_file(${content} ${FOLDER}/${name} COPYONLY)
endforeach()
