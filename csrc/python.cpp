// The Python module `_runtime`: which tiers there are, and the functions that Python calls.
#include <algorithm>
#include <stdexcept>

#include "ops.h"
#include "python.h"
#include "team.h"

namespace fastrnn {
namespace {

// tiers() -> names of those in here that this processor runs, widest first.
PyObject* tiers(PyObject*, PyObject*) {
  return answer([]() -> Owned {
    Owned names = owned(PyList_New(0));
    for (const Tier& t : TIERS) {
      if (!names || !t.fits()) continue;
      const Owned name = owned(PyUnicode_FromString(t.name.c_str()));
      if (!name || PyList_Append(names.get(), name.get()) != 0) throw PythonError();
    }
    return names;
  });
}

// prepare(tier, DLPack's table, torch.Tensor, torch.nn.Parameter, torch.empty_like, torch.autograd.graph.increment_version):
// register the ops, which run that tier's kernels.
// Not when this library is opened: it may turn out to hold nothing for this processor.
PyObject* prepare(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    const char* name = PyUnicode_AsUTF8AndSize(args[0], nullptr);
    if (!name) throw PythonError();
    tier = std::find_if(std::begin(TIERS), std::end(TIERS), [&](const Tier& t) { return t.name == name; });
    handed.exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(args[1], "dlpack_exchange_api"));
    if (!handed.exchange) throw PythonError();
    if (handed.exchange->header.version.major != DLPACK_MAJOR_VERSION)
      throw std::runtime_error("fastrnn: DLPack of another version");
    handed.tensor_type = kept(args[2]).release();
    handed.parameter_type = kept(args[3]).release();
    handed.empty_like = kept(args[4]).release();
    handed.increment_version = kept(args[5]).release();
    register_ops();
    return nullptr;
  });
}

// watch(functions): the short way is open from now on, and closed where one of these says something true.
PyObject* watch(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    if (!PyTuple_Check(args[0])) throw std::runtime_error("fastrnn: watch wants a tuple");
    handed.watchers = kept(args[0]).release();
    return nullptr;
  });
}

// differentiate(fastrnn.ops.apply_eagerly, apply_half, apply_cell, fastrnn.checkpoint.is_on, torch.cat, any tensor in float32)
PyObject* differentiate(PyObject*, PyObject* const* args, Py_ssize_t) {
  PyObject** const places[] = {&handed.apply,           &handed.apply_half, &handed.apply_cell,
                               &handed.recompute_is_on, &handed.cat,        &handed.float32_pattern};
  for (size_t i = 0; i < std::size(places); ++i) *places[i] = kept(args[i]).release();
  Py_RETURN_NONE;
}

// threads() -> the threads that a call may use now, and what limits them: torch's setting, the CPUs that it may use, by affinity
// alone and the quota, calls of other threads that run, and the number that earlier calls' losses leave. See TeamLimit.
PyObject* threads(PyObject*, PyObject*) {
  const TeamLimit limit = team_limit();
  const long long own = limit.threads(), cpus = limit.cpus.threads();
  const long long set = limit.set, allowed = limit.cpus.allowed, running = limit.running, fewer = limit.fewer;
  return Py_BuildValue("LLLLdLL", own, set, cpus, allowed, limit.cpus.quota, running, fewer);
}

// set_limits(on), see team.h
PyObject* limits(PyObject*, PyObject* const* args, Py_ssize_t) {
  set_limits(args[0] == Py_True);
  Py_RETURN_NONE;
}

// cpu_quota(root) -> CPUs' worth of time that control groups grant. root: where /proc and /sys are looked for.
PyObject* quota(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    const char* root = PyUnicode_AsUTF8AndSize(args[0], nullptr);
    if (!root) throw PythonError();
    return owned(PyFloat_FromDouble(cpu_quota(root)));
  });
}

// With as many arguments as it wants.
template <Function* Own, Py_ssize_t Wanted>
PyObject* counted(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count == Wanted) return Own(self, args, count);
  return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", Wanted, count);
}

template <Function* Own, Py_ssize_t Wanted>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&counted<Own, Wanted>)), METH_FASTCALL, nullptr};
}

}  // namespace
}  // namespace fastrnn

PyMODINIT_FUNC PyInit__runtime() {
  using namespace fastrnn;
  static PyMethodDef methods[] = {
      method<forward, 4>("forward"), method<step, 4>("step"), method<cell, 4>("cell"), method<pack, 3>("pack"),
      method<layer_forward, 1>("layer_forward"), method<layer_backward, 4>("layer_backward"),
      method<prepare, 6>("prepare"), method<watch, 1>("watch"), method<differentiate, 6>("differentiate"),
      method<quota, 1>("cpu_quota"), method<limits, 1>("set_limits"),
      {"tiers", tiers, METH_NOARGS, nullptr}, {"threads", threads, METH_NOARGS, nullptr}, {}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_runtime", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  if (!make_keys()) return nullptr;
  PyObject* module = PyModule_Create(&definition);
  if (module && (PyModule_AddStringConstant(module, "built_from", FASTRNN_BUILT_FROM) != 0 ||
                 PyModule_AddIntConstant(module, "l2_bytes", l2_bytes()) != 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
