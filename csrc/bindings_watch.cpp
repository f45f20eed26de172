// Walks the Python objects around an encoder's weights before every call. After a forward they are in no cache, and a
// loop in Python, which cannot prefetch, took four times as long.
#include "bindings_watch.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "checks.h"
#include "probe.h"

namespace xfast {
namespace {

// The objects are borrowed: whoever holds a Watch keeps them alive, where Python's garbage collector sees them.
class Watch {
 public:
  using Object = std::tuple<uintptr_t, int64_t, int64_t>;  // address, bytes, bytes behind each of its pointers

  // dicts: whose values must stay the same objects. modules: whose types and own dicts must. states: dicts that must
  // not get a key "forward". tensors, counted: whose memory and version must stay. samples: memory to look into.
  // objects: what to prefetch. scalars: dicts and keys whose value must stay the same object.
  Watch(const py::list& dicts, const py::list& modules, const py::list& states, const py::list& tensors,
        const py::list& counted, const std::vector<py::array>& samples, const std::vector<Object>& objects,
        const std::vector<std::pair<py::dict, py::str>>& scalars)
      : dicts_(borrowed<py::dict>(dicts, "dicts")),
        modules_(borrowed<py::object>(modules, "modules")),
        states_(borrowed<py::dict>(states, "states")),
        tensors_(borrowed<py::object>(tensors, "tensors")),
        counted_(borrowed<py::object>(counted, "counted")),
        samples_(samples) {
    for (PyObject* module : modules_) require(bool(dict_of(module)), "modules: must have a __dict__");
    for (const auto& [dict, key] : scalars) scalars_.emplace_back(dict.ptr(), key);
    for (const py::array& array : samples_) {
      require((array.flags() & py::array::c_style) != 0, "samples: must be contiguous");
      probe_.add(array.data(), array.nbytes());
    }
    for (const auto& [address, bytes, behind] : objects) {
      prefetcher_.add(address, bytes);
      if (behind > 0) prefetcher_.add_targets(address, bytes, behind);
    }
    prefetcher_.finish();
    walk([&](uint64_t sign) {
      signs_.push_back(sign);
      return true;
    });
  }

  bool changed() const {
    prefetcher_.run();
    size_t at = 0;
    const bool same = walk([&](uint64_t sign) { return at < signs_.size() && signs_[at++] == sign; });
    if (!same || at != signs_.size()) return true;
    for (PyObject* state : states_)
      if (PyDict_Contains(state, forward_.ptr()) != 0) return true;
    return probe_.changed();
  }

 private:
  template <class T>
  static std::vector<PyObject*> borrowed(const py::list& list, const char* name) {
    std::vector<PyObject*> out;
    for (const py::handle each : list) {
      require(py::isinstance<T>(each), std::string(name) + ": wrong type");
      out.push_back(each.ptr());
    }
    return out;
  }

  // Its __dict__, or nothing.
  static py::object dict_of(PyObject* object) {
    PyObject* dict = PyObject_GenericGetDict(object, nullptr);
    if (dict == nullptr) PyErr_Clear();
    return py::reinterpret_steal<py::object>(dict);
  }

  static uint64_t number(PyObject* value) {
    if (value == nullptr) throw py::error_already_set();
    const py::object held = py::reinterpret_steal<py::object>(value);
    const uint64_t found = PyLong_AsUnsignedLongLongMask(held.ptr());
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();  // it is no number
    return found;
  }

  // Everything that is compared, in order, until `visit` returns false; whether it never did.
  template <class F>
  bool walk(F&& visit) const {
    for (PyObject* dict : dicts_) {
      PyObject *key, *value;
      Py_ssize_t position = 0;
      while (PyDict_Next(dict, &position, &key, &value) != 0)
        if (!visit(reinterpret_cast<uintptr_t>(value))) return false;
    }
    for (PyObject* module : modules_) {
      if (!visit(reinterpret_cast<uintptr_t>(Py_TYPE(module)))) return false;
      if (!visit(reinterpret_cast<uintptr_t>(dict_of(module).ptr()))) return false;
    }
    for (const auto& [dict, key] : scalars_)
      if (!visit(reinterpret_cast<uintptr_t>(PyDict_GetItemWithError(dict, key.ptr())))) return false;
    for (PyObject* tensor : tensors_)
      if (!visit(number(PyObject_CallMethodNoArgs(tensor, data_ptr_.ptr())))) return false;
    for (PyObject* tensor : counted_)
      if (!visit(number(PyObject_GetAttr(tensor, version_.ptr())))) return false;
    return true;
  }

  std::vector<PyObject*> dicts_, modules_, states_, tensors_, counted_;
  std::vector<std::pair<PyObject*, py::str>> scalars_;  // the dicts are borrowed, too
  py::str data_ptr_{"data_ptr"}, version_{"_version"}, forward_{"forward"};
  std::vector<uint64_t> signs_;
  std::vector<py::array> samples_;  // keep the memory alive
  Probe probe_;
  Prefetcher prefetcher_;
};

}  // namespace

void bind_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&, const py::list&,
                    const std::vector<py::array>&, const std::vector<Watch::Object>&,
                    const std::vector<std::pair<py::dict, py::str>>&>(),
           py::arg("dicts"), py::arg("modules"), py::arg("states"), py::arg("tensors"), py::arg("counted"),
           py::arg("samples"), py::arg("objects"), py::arg("scalars") = std::vector<std::pair<py::dict, py::str>>{})
      .def("changed", &Watch::changed);
}

}  // namespace xfast
