// A vendor's library, opened by name when it is needed.
#pragma once
#include <dlfcn.h>

#include <string>

namespace slg {

class SharedLibrary {
 public:
  // The one called `asked`, or else the first of `names` that there is; false, and why() says it,
  // where there is none. First one that this process has already: another engine's streams and
  // memory are of no use to a second.
  bool open(const char* asked, const char* const* names) {
    const char* const one[] = {asked, nullptr};
    if (asked && *asked) names = one;
    for (int mode : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW}) {
      for (const char* const* name = names; *name; ++name) {
        library_ = dlopen(*name, mode | RTLD_LOCAL);  // never closed: drivers do not like it
        path_ = *name;
        if (library_) return true;
        const char* text = dlerror();
        why_ = text ? text : "it is not loaded";
      }
    }
    return false;
  }

  // Sets a pointer to a function; false where the library has none of that name.
  bool find(void* field, const char* name) const {
    void* found = dlsym(library_, name);
    *static_cast<void**>(field) = found;
    return found != nullptr;
  }

  const std::string& path() const { return path_; }
  const std::string& why() const { return why_; }

 private:
  void* library_ = nullptr;
  std::string path_, why_;
};

}  // namespace slg
