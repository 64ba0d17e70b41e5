//! A real device behind [`Gpu`]: the driver's memory, copies, launches and recorded graphs.
//!
//! All goes through one stream, so that things happen in the order they are asked for. Copies pass
//! through pinned memory: a write returns once its bytes are there, a read waits. Not here: which
//! kernels run ([`shaders::CUDA`] has them all), what for.

#![allow(unsafe_code)]

use super::Options;
use super::api::Failure;
use super::cache::cubins;
use super::devices::Context;
use super::gpu::{Arg, Gpu, Launch, Pointer, Recorded};
use super::nvrtc::Nvrtc;
use crate::Error;
use cudarc::driver::sys::{
    self, CUdeviceptr, CUfunction, CUfunction_attribute, CUgraph, CUgraphExec, CUlaunchAttribute,
    CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUmodule, CUresult, CUstream,
    CUstream_flags, CUstreamCaptureMode,
};
use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::ptr::null_mut;

/// Bytes of pinned memory in each direction: a step's logits, or a part of the weights.
const STAGING: usize = 8 << 20;
/// Where a write starts in pinned memory.
const STAGING_ALIGN: usize = 64;
/// Bytes of dynamic shared memory that a kernel may have without asking.
const SHARED_FREE: u32 = 48 << 10;
/// Most parameters of a kernel.
const ARGS_MAX: usize = 32;
/// First driver that records a launch which may start before the one before it has ended.
const EARLY_DRIVER: (u32, u32) = (12, 3);
/// First generation of devices whose kernels can wait for the launches before them by themselves.
const EARLY_CAPABILITY: (u32, u32) = (9, 0);

/// Other threads may do as they like while launches are recorded.
const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
/// The most dynamic shared memory that a kernel may have.
const SHARED_MOST: CUfunction_attribute =
    CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;

/// A kernel that was looked up.
#[derive(Clone, Copy)]
struct Function {
    handle: CUfunction,
    /// Most bytes of dynamic shared memory that it may be launched with.
    shared: u32,
}

/// A CUDA device with all kernels loaded.
pub(crate) struct Driver {
    context: Context,
    multiprocessors: usize,
    stream: CUstream,
    modules: Vec<CUmodule>,
    functions: HashMap<&'static str, Function>,
    memory: Vec<CUdeviceptr>,
    graphs: Vec<CUgraphExec>,
    /// Pinned: on its way in, and out.
    staging: [*mut u8; 2],
    /// Bytes of the first that the device may still have to read.
    used: usize,
    /// Whether recorded launches may start while the one before them still runs: every kernel waits
    /// for it (`await_launches` of `shaders/cuda/prelude.cuh`) before it touches what others leave.
    early: bool,
    /// The kernel asked for last: where an error shows up later, it is a hint.
    last: &'static str,
}

// SAFETY: the handles belong to the context, which may be used from any thread that makes it
// current, as every call here does; the pinned memory is this value's own.
unsafe impl Send for Driver {}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Driver of {}", self.context.name())
    }
}

impl Driver {
    /// Takes device `index`, compiles the kernels for it or finds them compiled, and loads them.
    ///
    /// # Errors
    /// [`Error::Device`]: no driver, no such device, no compiler, or the driver's reason.
    pub(crate) fn open(index: usize, options: &Options) -> Result<Self, Error> {
        let context = Context::open(index)?;
        let info = context.info()?;
        let nvrtc = Nvrtc::find(&options.nvrtc, Some(info.driver.0))?;
        let cubins = cubins(&nvrtc, shaders::CUDA, info.arch(), options.cache.as_deref())?;
        if let Some(why) = &cubins.not_kept {
            (options.say)(why);
        }
        let mut driver = Self {
            context,
            multiprocessors: info.multiprocessors as usize,
            stream: null_mut(),
            modules: vec![],
            functions: HashMap::new(),
            memory: vec![],
            graphs: vec![],
            staging: [null_mut(); 2],
            used: 0,
            early: info.driver >= EARLY_DRIVER && info.capability >= EARLY_CAPABILITY,
            last: "none",
        };
        driver.prepare()?;
        for (source, image) in shaders::CUDA.iter().zip(&cubins.images) {
            driver.load(source.name, image)?;
        }
        Ok(driver)
    }

    fn prepare(&mut self) -> Result<(), Error> {
        // SAFETY: the context is current; the stream is destroyed by `drop`.
        let code = unsafe {
            sys::cuStreamCreate(&raw mut self.stream, CUstream_flags::CU_STREAM_NON_BLOCKING as u32)
        };
        self.context.check(code, "making a stream")?;
        for at in 0..2 {
            let mut memory: *mut c_void = null_mut();
            // SAFETY: the context is current; the memory is freed by `drop`.
            let code = unsafe { sys::cuMemHostAlloc(&raw mut memory, STAGING, 0) };
            self.context.check(code, "taking pinned memory of the host")?;
            self.staging[at] = memory.cast();
        }
        Ok(())
    }

    fn load(&mut self, name: &str, image: &[u8]) -> Result<(), Error> {
        let mut module = null_mut();
        // SAFETY: the image is a CUBIN, which says its own length; it is read before the return.
        let code = unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast()) };
        self.context.check(code, &format!("loading the kernels of {name}"))?;
        self.modules.push(module);
        Ok(())
    }

    /// The kernel of `launch`, allowed as much shared memory as it asks for.
    fn function(&mut self, launch: &Launch) -> Result<CUfunction, Error> {
        let mut found = match self.functions.get(launch.kernel) {
            Some(found) => *found,
            None => Function { handle: self.look_up(launch.kernel)?, shared: SHARED_FREE },
        };
        if launch.shared > found.shared {
            let bytes = c_int::try_from(launch.shared).unwrap_or(c_int::MAX);
            // SAFETY: the function lives as long as its module.
            let code = unsafe { sys::cuFuncSetAttribute(found.handle, SHARED_MOST, bytes) };
            let asked = || format!("kernel {}, {bytes} bytes of shared memory", launch.kernel);
            self.context.api.check(code).map_err(|f| self.context.error(&asked(), &f))?;
            found.shared = launch.shared;
        }
        self.functions.insert(launch.kernel, found);
        Ok(found.handle)
    }

    fn look_up(&self, kernel: &str) -> Result<CUfunction, Error> {
        let fail = |failure: &Failure| self.context.error(&format!("kernel {kernel}"), failure);
        let missing = Failure {
            code: CUresult::CUDA_ERROR_NOT_FOUND,
            text: "no source has this kernel".to_owned(),
        };
        let name = CString::new(kernel).map_err(|_| fail(&missing))?;
        for &module in &self.modules {
            let mut handle = null_mut();
            // SAFETY: the module is loaded; the name ends with a zero.
            let code = unsafe { sys::cuModuleGetFunction(&raw mut handle, module, name.as_ptr()) };
            match self.context.api.check(code) {
                Ok(()) => return Ok(handle),
                Err(failure) if failure.code == CUresult::CUDA_ERROR_NOT_FOUND => {}
                Err(failure) => return Err(fail(&failure)),
            }
        }
        Err(fail(&missing))
    }

    /// Asks for a launch; `early` lets it start before the launch asked for last has ended.
    fn enqueue(&mut self, function: CUfunction, launch: &Launch, early: bool) -> Result<(), Error> {
        let Launch { kernel, grid: [x, y, z], .. } = *launch;
        if [x, y, z].contains(&0) {
            return Ok(());
        }
        let (mut values, mut pointers) = ([0u64; ARGS_MAX], [null_mut::<c_void>(); ARGS_MAX]);
        if launch.args.len() > ARGS_MAX {
            let text = format!("{} arguments, {ARGS_MAX} at most", launch.args.len());
            return Err(self.context.error(
                &format!("kernel {kernel}"),
                &Failure { code: CUresult::CUDA_ERROR_INVALID_VALUE, text },
            ));
        }
        for ((value, pointer), &arg) in values.iter_mut().zip(&mut pointers).zip(&launch.args) {
            *value = bits(arg);
            *pointer = std::ptr::from_mut(value).cast();
        }
        self.last = kernel;
        let mut attributes = [starts_early()];
        let config = config(launch, self.stream, if early { &mut attributes } else { &mut [] });
        // SAFETY: the function is loaded, the stream lives, and each pointer is to a value that is
        // as large as any parameter and is read before the return, as the attributes are. That the
        // values are what the kernel expects is what its tests on a processor show.
        let code = unsafe {
            sys::cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), null_mut())
        };
        let asked = |failure| self.context.error(&format!("kernel {kernel}"), &failure);
        self.context.api.check(code).map_err(asked)
    }

    /// Waits for all that was asked for.
    fn wait(&mut self) -> Result<(), Error> {
        // SAFETY: the stream lives.
        let code = unsafe { sys::cuStreamSynchronize(self.stream) };
        let asked = || format!("waiting for the device (kernel {} was the last)", self.last);
        self.context.api.check(code).map_err(|f| self.context.error(&asked(), &f))?;
        self.used = 0;
        Ok(())
    }

    /// Why `bytes` were not given.
    fn no_memory(&self, bytes: usize, failure: &Failure) -> Error {
        let (free, all) = self.context.memory().unwrap_or((0, 0));
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        let what = if failure.code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            "out of memory"
        } else {
            "no memory"
        };
        let asked = format!(
            "{what}: {:.1} MiB were asked for, {:.1} of {:.1} MiB are free",
            mib(bytes),
            mib(free),
            mib(all)
        );
        self.context.error(&asked, failure)
    }

    /// The launches as a graph; nothing runs.
    fn capture(&mut self, launches: &[Launch]) -> Result<CUgraph, Error> {
        let functions: Vec<CUfunction> =
            launches.iter().map(|launch| self.function(launch)).collect::<Result<_, _>>()?;
        // SAFETY: the stream lives, and is this value's own.
        let code = unsafe { sys::cuStreamBeginCapture_v2(self.stream, MODE) };
        self.context.check(code, "beginning to record")?;
        let mut each = functions.into_iter().zip(launches).enumerate();
        let asked = each.try_for_each(|(at, (function, launch))| {
            self.enqueue(function, launch, self.early && at > 0)
        });
        let mut graph = null_mut();
        // SAFETY: the stream is recording, and must not after a failure either.
        let ended = unsafe { sys::cuStreamEndCapture(self.stream, &raw mut graph) };
        let result = asked.and_then(|()| self.context.check(ended, "recording"));
        if result.is_err() && !graph.is_null() {
            // SAFETY: made above, not used again. A failure could only leak.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
        result.map(|()| graph)
    }
}

/// A launch as the driver takes it.
fn config(
    launch: &Launch,
    stream: CUstream,
    attributes: &mut [CUlaunchAttribute],
) -> CUlaunchConfig {
    let [x, y, z] = launch.grid;
    CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: launch.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared,
        hStream: stream,
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    }
}

/// Says that a launch may start before the one before it has ended.
fn starts_early() -> CUlaunchAttribute {
    CUlaunchAttribute {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}

/// An argument as a kernel's parameter: its bytes first, then zeros.
fn bits(arg: Arg) -> u64 {
    let half = |bytes: [u8; 4]| {
        let [a, b, c, d] = bytes;
        u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0])
    };
    match arg {
        Arg::Pointer(pointer) => pointer.0,
        Arg::Int(value) => half(value.to_ne_bytes()),
        Arg::Float(value) => half(value.to_ne_bytes()),
    }
}

impl Gpu for Driver {
    fn name(&self) -> String {
        self.context.name()
    }

    fn free(&mut self) -> Option<usize> {
        self.context.make_current().and_then(|()| self.context.memory()).ok().map(|(free, _)| free)
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn alloc(&mut self, bytes: usize) -> Result<Pointer, Error> {
        self.context.make_current()?;
        // The driver refuses to give nothing; its addresses are multiples of 256 or more.
        let (len, mut address) = (bytes.max(1), 0);
        // SAFETY: the context is current; the memory is freed by `drop`.
        let code = unsafe { sys::cuMemAlloc_v2(&raw mut address, len) };
        self.context.api.check(code).map_err(|failure| self.no_memory(len, &failure))?;
        self.memory.push(address);
        // SAFETY: the memory has `len` bytes.
        let code = unsafe { sys::cuMemsetD8Async(address, 0, len, self.stream) };
        self.context.check(code, "clearing memory")?;
        Ok(Pointer(address))
    }

    fn write(&mut self, to: Pointer, bytes: &[u8]) -> Result<(), Error> {
        self.context.make_current()?;
        let mut to = to.0;
        for part in bytes.chunks(STAGING) {
            if self.used + part.len() > STAGING {
                self.wait()?;
            }
            // SAFETY: `STAGING` bytes lie there, of which the device reads only those before
            // `used`; the part fits behind them.
            let code = unsafe {
                let at = self.staging[0].add(self.used);
                at.copy_from_nonoverlapping(part.as_ptr(), part.len());
                sys::cuMemcpyHtoDAsync_v2(to, at.cast(), part.len(), self.stream)
            };
            self.context.check(code, "copying to the device")?;
            self.used = (self.used + part.len()).next_multiple_of(STAGING_ALIGN);
            to += part.len() as u64;
        }
        Ok(())
    }

    fn read(&mut self, from: Pointer, bytes: &mut [u8]) -> Result<(), Error> {
        self.context.make_current()?;
        let mut from = from.0;
        for part in bytes.chunks_mut(STAGING) {
            let at = self.staging[1];
            // SAFETY: `STAGING` bytes lie there, which nobody else uses before `wait` returns.
            let code =
                unsafe { sys::cuMemcpyDtoHAsync_v2(at.cast(), from, part.len(), self.stream) };
            self.context.check(code, "copying from the device")?;
            self.wait()?;
            // SAFETY: the device has written so many bytes, and is done.
            unsafe { part.as_mut_ptr().copy_from_nonoverlapping(at, part.len()) };
            from += part.len() as u64;
        }
        Ok(())
    }

    fn launch(&mut self, launch: &Launch) -> Result<(), Error> {
        self.context.make_current()?;
        let function = self.function(launch)?;
        self.enqueue(function, launch, false)
    }

    fn record(&mut self, launches: Vec<Launch>) -> Result<Recorded, Error> {
        self.context.make_current()?;
        let graph = self.capture(&launches)?;
        let mut ready = null_mut();
        // SAFETY: the graph lives until it is destroyed here; what is made of it is destroyed by
        // `drop`, and a failure to destroy could only leak.
        let code = unsafe {
            let code = sys::cuGraphInstantiateWithFlags(&raw mut ready, graph, 0);
            let _ = sys::cuGraphDestroy(graph);
            code
        };
        self.context.check(code, "preparing what was recorded")?;
        self.graphs.push(ready);
        // SAFETY: both live. Without this the first replay would take longer.
        let code = unsafe { sys::cuGraphUpload(ready, self.stream) };
        self.context.check(code, "preparing what was recorded")?;
        Ok(Recorded { launches, graph: Some(self.graphs.len() - 1) })
    }

    fn replay(&mut self, recorded: &Recorded) -> Result<(), Error> {
        self.context.make_current()?;
        let graph = recorded.graph.and_then(|at| self.graphs.get(at).copied());
        let Some(graph) = graph else {
            return recorded.launches.iter().try_for_each(|launch| self.launch(launch));
        };
        self.last = recorded.launches.last().map_or(self.last, |launch| launch.kernel);
        // SAFETY: both live.
        let code = unsafe { sys::cuGraphLaunch(graph, self.stream) };
        self.context.check(code, "running what was recorded")
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // A failure here could only leak, and nobody is left to be told.
        let _ = self.context.make_current();
        // SAFETY: each was made by this value and is not used again; the device is done with them
        // once the stream is. The context goes last, as a field.
        unsafe {
            let made = !self.stream.is_null();
            let _ = made.then(|| sys::cuStreamSynchronize(self.stream));
            self.graphs.iter().for_each(|&graph| _ = sys::cuGraphExecDestroy(graph));
            self.modules.iter().for_each(|&module| _ = sys::cuModuleUnload(module));
            self.memory.iter().for_each(|&address| _ = sys::cuMemFree_v2(address));
            let staging = self.staging.iter().filter(|at| !at.is_null());
            staging.for_each(|at| _ = sys::cuMemFreeHost(at.cast()));
            let _ = made.then(|| sys::cuStreamDestroy_v2(self.stream));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Places;

    #[test]
    fn arguments_are_laid_out_as_parameters() {
        assert_eq!(bits(Arg::Pointer(Pointer(0x0123_4567_89ab_cdef))), 0x0123_4567_89ab_cdef);
        assert_eq!(bits(Arg::Int(-2)).to_ne_bytes()[..4], (-2i32).to_ne_bytes());
        assert_eq!(bits(Arg::Float(1.5)).to_ne_bytes()[..4], 1.5f32.to_ne_bytes());
    }

    /// On a machine with a device and a compiler; elsewhere the reason is printed.
    #[test]
    fn a_device_keeps_what_is_written_and_runs_kernels() {
        let places = Places::new(|name| std::env::var_os(name), None);
        let mut gpu = match Driver::open(0, &Options { nvrtc: places, cache: None, say: |_| {} }) {
            Ok(gpu) => gpu,
            Err(error) => return println!("skipped: {error}"),
        };
        let bytes: Vec<u8> = (0..STAGING + 1000).map(|i| (i % 251) as u8).collect();
        let memory = gpu.alloc(bytes.len() + 8).unwrap();
        assert_eq!(memory.0 % 256, 0);
        gpu.write(memory, &bytes).unwrap();
        let mut back = vec![1; bytes.len() + 8];
        gpu.read(memory, &mut back).unwrap();
        assert!(back[..bytes.len()] == bytes && back[bytes.len()..] == [0; 8]);
        let missing =
            Launch { kernel: "no_such", grid: [1; 3], threads: 32, shared: 0, args: vec![] };
        let said = gpu.launch(&missing).unwrap_err().to_string();
        assert!(said.contains("no_such"), "{said}");
        let said = gpu.alloc(1 << 46).unwrap_err().to_string();
        assert!(said.contains("out of memory") && said.contains("are free"), "{said}");
    }
}
