//! `husk.toml`: one file, one typed, checked [`Config`].
//!
//! The shim and the command-line tool read it; neither sees a value that has not been checked. Each key is written down
//! once, in [`RawVm`], [`RawNetwork`] or [`RawStorage`], and checked once, in `overlaid` of its table; its reference is the
//! configuration chapter of the book.

#![forbid(unsafe_code)]

mod error;

use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use toml::{Spanned, Value};

pub use error::ConfigError;
use error::Text;

/// Where the configuration is, unless containerd names another file.
pub const DEFAULT_PATH: &str = "/etc/husk/husk.toml";

/// Where the guest's kernel is, unless configured.
pub const DEFAULT_KERNEL: &str = "/usr/share/husk/vmlinux";

/// Where the guest's initramfs is, unless configured.
pub const DEFAULT_INITRAMFS: &str = "/usr/share/husk/initramfs.cpio";

/// What an x86_64 VM can address with 8-bit local APIC ids, of which 255 is the broadcast.
const VCPUS: RangeInclusive<u8> = 1..=255;

/// From what a small kernel and the agent need to run at all, to 1 TiB.
const MEMORY_MIB: RangeInclusive<u32> = 64..=1024 * 1024;

/// In seconds, to one hour.
const BOOT_TIMEOUT_S: RangeInclusive<u32> = 1..=3600;

/// Half of the kernel's COMMAND_LINE_SIZE on x86_64: the other half is for what the hypervisor says itself.
const KERNEL_PARAMS_MAX_LEN: usize = 1024;

/// How large a DAX window may be. Linux maps 2 MiB at a time: with fewer of those, programs would wait for each other. The
/// largest one's administration is 256 MiB of the guest's memory.
const DAX_WINDOW_MIB: RangeInclusive<u32> = 16..=16384;

/// How large the disk of an emptyDir may be.
const EMPTY_DIR_DISK_MIB: RangeInclusive<u32> = 16..=1_048_576;

/// Before the key of an annotation that sets a key of the configuration for one pod.
const ANNOTATION_PREFIX: &str = "io.husk.";

/// The keys that an administrator may leave to pods. None of the others is a pod's business: a path is one of the host's,
/// which the shim opens, or runs, as root, and what host networking means is the node's decision.
const ANNOTATION_KEYS: [&str; 12] = [
    "vm.vcpus",
    "vm.max_vcpus",
    "vm.memory_mib",
    "vm.max_memory_mib",
    "vm.kernel_params",
    "vm.boot_timeout_s",
    "network.datapath",
    "storage.sharing",
    "storage.cache",
    "storage.writeback",
    "storage.dax_window_mib",
    "storage.empty_dir_disk_mib",
];

/// The configuration, checked.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Config {
    vm: Vm,
    network: Network,
    storage: Storage,
    annotations: Annotations,
}

/// What pods may set: the table `[annotations]`.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Annotations {
    /// A part of [`ANNOTATION_KEYS`].
    allow: Vec<String>,
}

/// The virtual machine of a pod, before anything that the pod itself asks for: the table `[vm]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    kernel: PathBuf,
    initramfs: PathBuf,
    kernel_params: String,
    vcpus: u8,
    max_vcpus: u8,
    memory_mib: u32,
    max_memory_mib: Option<u32>,
    boot_timeout: Duration,
}

/// The network of a pod: the table `[network]`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    datapath: Datapath,
    host_network: HostNetwork,
}

/// What carries packets between a tap of the host and the guest's virtio-net device.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Datapath {
    /// The host's kernel where it can, else the VM's worker process.
    #[default]
    Auto,
    /// The host's kernel: /dev/vhost-net has to be there.
    Vhost,
    /// The VM's worker process.
    Worker,
}

/// What becomes of a container that asks for the network of the host, which no VM can have.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum HostNetwork {
    /// It is not created.
    #[default]
    Refuse,
    /// It is created, without any network but its loopback interface.
    Isolate,
}

/// How a pod has its files: the table `[storage]`.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Storage {
    sharing: Sharing,
    server: Option<PathBuf>,
    cache: Cache,
    writeback: bool,
    dax_window_mib: u32,
    empty_dir_disk_mib: u32,
}

/// By what the host shares files with the guest.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// FUSE's requests, by virtio.
    #[default]
    VirtioFs,
    /// 9P2000.L, by virtio.
    NineP,
}

/// How far the guest relies on what it has read before of the files that the host shares with it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Until a file is opened again, and for a second.
    #[default]
    Auto,
    /// Not at all.
    None,
    /// As if nobody else changed them.
    Always,
}

impl Config {
    /// Reads and checks the file at `path`, which has to be there.
    ///
    /// # Errors
    /// The file cannot be read, or holds a key or a value that is not allowed.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::from_toml(&text, path)
    }

    /// Reads and checks the file at [`DEFAULT_PATH`]; without one, everything has its self.
    ///
    /// # Errors
    /// As for [`Config::load`], save that the file may be missing.
    pub fn load_default() -> Result<Self, ConfigError> {
        Self::load_if_present(Path::new(DEFAULT_PATH))
    }

    fn load_if_present(path: &Path) -> Result<Self, ConfigError> {
        match Self::load(path) {
            Err(ConfigError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Ok(Self::default())
            }
            result => result,
        }
    }

    /// Checks `text`; errors say that it is from `origin`.
    ///
    /// # Errors
    /// The text is not TOML, or holds a key or a value that is not allowed.
    pub fn from_toml(text: &str, origin: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let text = Text::new(text, origin.as_ref());
        let raw: RawConfig =
            toml::from_str(text.as_str()).map_err(|err| text.not_understood(&err))?;
        Self::default().overlaid(raw, &text)
    }

    /// The configuration for a pod with these annotations: `io.husk.vm.memory_mib: "1024"` sets `vm.memory_mib`, if the
    /// file allows that.
    ///
    /// # Errors
    /// `AnnotationRefused` for a key that pods may not set; as [`Config::from_toml`] for a value that is not allowed.
    pub fn with_annotations<'a>(
        self,
        annotations: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, ConfigError> {
        let mut tables = BTreeMap::<_, BTreeMap<_, _>>::new();
        for (name, value) in annotations {
            let Some(key) = name.strip_prefix(ANNOTATION_PREFIX) else {
                continue;
            };
            let (table, in_table) = key
                .split_once('.')
                .filter(|_| self.annotations.allow.iter().any(|allowed| allowed == key))
                .ok_or_else(|| ConfigError::AnnotationRefused {
                    name: name.to_owned(),
                    allowed: self.annotations.allow.join(", "),
                })?;
            // All values of annotations are strings.
            let value = (value.parse().map(Value::Integer))
                .or_else(|_| value.parse().map(Value::Boolean))
                .unwrap_or_else(|_| Value::from(value));
            tables.entry(table).or_default().insert(in_table, value);
        }
        let text =
            toml::to_string(&tables).expect("strings, integers and truths in tables are TOML");
        let text = Text::new(&text, Path::new("the pod's annotations"));
        let raw = toml::from_str(text.as_str()).map_err(|err| text.not_understood(&err))?;
        self.overlaid(raw, &text)
    }

    /// This configuration, save for what `raw` says.
    fn overlaid(self, raw: RawConfig, text: &Text<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            vm: self.vm.overlaid(raw.vm, text)?,
            network: self.network.overlaid(raw.network, text)?,
            storage: self.storage.overlaid(raw.storage, text)?,
            annotations: self.annotations.overlaid(raw.annotations, text)?,
        })
    }

    /// The virtual machine.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// The network.
    #[must_use]
    pub fn network(&self) -> Network {
        self.network
    }

    /// The files of containers.
    #[must_use]
    pub fn storage(&self) -> &Storage {
        &self.storage
    }
}

impl Network {
    /// What carries the packets.
    #[must_use]
    pub fn datapath(self) -> Datapath {
        self.datapath
    }

    /// What becomes of a container that asks for the host's network.
    #[must_use]
    pub fn host_network(self) -> HostNetwork {
        self.host_network
    }

    fn overlaid(self, raw: RawNetwork, text: &Text<'_>) -> Result<Self, ConfigError> {
        let datapaths = [
            ("auto", Datapath::Auto),
            ("vhost", Datapath::Vhost),
            ("worker", Datapath::Worker),
        ];
        let host_networks = [
            ("refuse", HostNetwork::Refuse),
            ("isolate", HostNetwork::Isolate),
        ];
        Ok(Self {
            datapath: check(text, "network.datapath", raw.datapath, |value| {
                one_of(value, &datapaths)
            })?
            .unwrap_or(self.datapath),
            host_network: check(text, "network.host_network", raw.host_network, |value| {
                one_of(value, &host_networks)
            })?
            .unwrap_or(self.host_network),
        })
    }
}

impl Storage {
    /// By what the host shares files.
    #[must_use]
    pub fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// The program that serves the files, with virtiofsd's options; an absolute path. `None` is the VM's worker process. With
    /// one, files are shared by virtio-fs, and there is no window.
    #[must_use]
    pub fn server(&self) -> Option<&Path> {
        self.server.as_deref()
    }

    /// How far the guest relies on what it has read before.
    #[must_use]
    pub fn cache(&self) -> Cache {
        self.cache
    }

    /// The guest keeps what is written for a while before it tells the host.
    #[must_use]
    pub fn writeback(&self) -> bool {
        self.writeback
    }

    /// The size of the window in which the guest has files of the host mapped. None if zero.
    #[must_use]
    pub fn dax_window_mib(&self) -> u32 {
        self.dax_window_mib
    }

    /// The size of the disk that each emptyDir volume of a pod is. None if zero: they are folders.
    #[must_use]
    pub fn empty_dir_disk_mib(&self) -> u32 {
        self.empty_dir_disk_mib
    }

    fn overlaid(self, raw: RawStorage, text: &Text<'_>) -> Result<Self, ConfigError> {
        let caches = [
            ("auto", Cache::Auto),
            ("none", Cache::None),
            ("always", Cache::Always),
        ];
        let server = check(text, "storage.server", raw.server, absolute_path)?.or(self.server);
        let protocols: &[_] = match server {
            None => &[("virtio-fs", Sharing::VirtioFs), ("9p", Sharing::NineP)],
            Some(_) => &[("virtio-fs", Sharing::VirtioFs)],
        };
        Ok(Self {
            sharing: check(text, "storage.sharing", raw.sharing, |value| {
                one_of(value, protocols).map_err(|expected| beside(server.as_deref(), expected))
            })?
            .unwrap_or(self.sharing),
            cache: check(text, "storage.cache", raw.cache, |value| {
                one_of(value, &caches)
            })?
            .unwrap_or(self.cache),
            writeback: check(text, "storage.writeback", raw.writeback, truth)?
                .unwrap_or(self.writeback),
            dax_window_mib: check(
                text,
                "storage.dax_window_mib",
                raw.dax_window_mib,
                |value| match server {
                    None => none_or(value, &DAX_WINDOW_MIB),
                    Some(_) => integer(value, &(0..=0))
                        .map_err(|_| beside(server.as_deref(), "0".to_owned())),
                },
            )?
            .unwrap_or(self.dax_window_mib),
            empty_dir_disk_mib: check(
                text,
                "storage.empty_dir_disk_mib",
                raw.empty_dir_disk_mib,
                |value| none_or(value, &EMPTY_DIR_DISK_MIB),
            )?
            .unwrap_or(self.empty_dir_disk_mib),
            server,
        })
    }
}

impl Annotations {
    fn overlaid(self, raw: RawAnnotations, text: &Text<'_>) -> Result<Self, ConfigError> {
        let allow = check(text, "annotations.allow", raw.allow, |value| {
            let known = |key: &Value| {
                key.as_str()
                    .filter(|key| ANNOTATION_KEYS.contains(key))
                    .map(str::to_owned)
            };
            value
                .as_array()
                .and_then(|keys| keys.iter().map(known).collect())
                .ok_or_else(|| format!("an array of {}", ANNOTATION_KEYS.join(", ")))
        })?;
        Ok(Self {
            allow: allow.unwrap_or(self.allow),
        })
    }
}

impl Vm {
    /// The guest's kernel, an ELF vmlinux or a bzImage; an absolute path.
    #[must_use]
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// The guest's initramfs, whose `/init` is husk-agent; an absolute path.
    #[must_use]
    pub fn initramfs(&self) -> &Path {
        &self.initramfs
    }

    /// What is added to the guest kernel's command line: printable ASCII.
    #[must_use]
    pub fn kernel_params(&self) -> &str {
        &self.kernel_params
    }

    /// Virtual processors, at least one.
    #[must_use]
    pub fn vcpus(&self) -> u8 {
        self.vcpus
    }

    /// The most virtual processors that a VM is given while it runs.
    #[must_use]
    pub fn max_vcpus(&self) -> u8 {
        self.max_vcpus
    }

    /// Memory of the guest in MiB.
    #[must_use]
    pub fn memory_mib(&self) -> u32 {
        self.memory_mib
    }

    /// The most memory, in MiB, that a VM is given while it runs; `None` is as much as the host has.
    #[must_use]
    pub fn max_memory_mib(&self) -> Option<u32> {
        self.max_memory_mib
    }

    /// How long a guest may take from the start of its vCPUs until its agent is ready.
    #[must_use]
    pub fn boot_timeout(&self) -> Duration {
        self.boot_timeout
    }

    fn overlaid(self, raw: RawVm, text: &Text<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            kernel: check(text, "vm.kernel", raw.kernel, absolute_path)?.unwrap_or(self.kernel),
            initramfs: check(text, "vm.initramfs", raw.initramfs, absolute_path)?
                .unwrap_or(self.initramfs),
            kernel_params: check(text, "vm.kernel_params", raw.kernel_params, kernel_params)?
                .unwrap_or(self.kernel_params),
            vcpus: check(text, "vm.vcpus", raw.vcpus, |value| integer(value, &VCPUS))?
                .unwrap_or(self.vcpus),
            max_vcpus: check(text, "vm.max_vcpus", raw.max_vcpus, |value| {
                integer(value, &VCPUS)
            })?
            .unwrap_or(self.max_vcpus),
            memory_mib: check(text, "vm.memory_mib", raw.memory_mib, |value| {
                integer(value, &MEMORY_MIB)
            })?
            .unwrap_or(self.memory_mib),
            max_memory_mib: check(text, "vm.max_memory_mib", raw.max_memory_mib, |value| {
                integer(value, &MEMORY_MIB)
            })?
            .or(self.max_memory_mib),
            boot_timeout: check(text, "vm.boot_timeout_s", raw.boot_timeout_s, |value| {
                integer(value, &BOOT_TIMEOUT_S)
            })?
            .map_or(self.boot_timeout, |seconds| {
                Duration::from_secs(seconds.into())
            }),
        })
    }
}

impl Default for Vm {
    fn default() -> Self {
        Self {
            kernel: DEFAULT_KERNEL.into(),
            initramfs: DEFAULT_INITRAMFS.into(),
            kernel_params: String::new(),
            vcpus: 1,
            max_vcpus: 4,
            memory_mib: 512,
            max_memory_mib: None,
            boot_timeout: Duration::from_secs(30),
        }
    }
}

/// The file as it is written. Values keep their TOML type and their place until they are checked, so that an error can
/// name the key, the line and what is allowed, in our words.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    #[serde(default)]
    vm: RawVm,
    #[serde(default)]
    network: RawNetwork,
    #[serde(default)]
    storage: RawStorage,
    #[serde(default)]
    annotations: RawAnnotations,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table of keys")]
struct RawAnnotations {
    allow: Option<Spanned<Value>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table of keys")]
struct RawNetwork {
    datapath: Option<Spanned<Value>>,
    host_network: Option<Spanned<Value>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table of keys")]
struct RawStorage {
    sharing: Option<Spanned<Value>>,
    server: Option<Spanned<Value>>,
    cache: Option<Spanned<Value>>,
    writeback: Option<Spanned<Value>>,
    dax_window_mib: Option<Spanned<Value>>,
    empty_dir_disk_mib: Option<Spanned<Value>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table of keys")]
struct RawVm {
    kernel: Option<Spanned<Value>>,
    initramfs: Option<Spanned<Value>>,
    kernel_params: Option<Spanned<Value>>,
    vcpus: Option<Spanned<Value>>,
    max_vcpus: Option<Spanned<Value>>,
    memory_mib: Option<Spanned<Value>>,
    max_memory_mib: Option<Spanned<Value>>,
    boot_timeout_s: Option<Spanned<Value>>,
}

/// Checks the value of one key, if the file has it. `allowed` returns the checked value, or what would be allowed.
fn check<T>(
    text: &Text<'_>,
    key: &'static str,
    value: Option<Spanned<Value>>,
    allowed: impl FnOnce(&Value) -> Result<T, String>,
) -> Result<Option<T>, ConfigError> {
    value
        .map(|value| {
            allowed(value.get_ref()).map_err(|expected| text.not_allowed(key, &value, expected))
        })
        .transpose()
}

fn absolute_path(value: &Value) -> Result<PathBuf, String> {
    value
        .as_str()
        .filter(|path| !path.contains('\0'))
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .ok_or_else(|| "an absolute path".to_owned())
}

fn kernel_params(value: &Value) -> Result<String, String> {
    value
        .as_str()
        .filter(|params| params.len() <= KERNEL_PARAMS_MAX_LEN)
        .filter(|params| {
            params
                .bytes()
                .all(|byte| byte == b' ' || byte.is_ascii_graphic())
        })
        .map(str::to_owned)
        .ok_or_else(|| {
            format!("a string of at most {KERNEL_PARAMS_MAX_LEN} printable ASCII characters")
        })
}

fn truth(value: &Value) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| "true or false".to_owned())
}

fn none_or(value: &Value, range: &RangeInclusive<u32>) -> Result<u32, String> {
    integer(value, &(0..=0))
        .or_else(|_| integer(value, range))
        .map_err(|expected| format!("0 for none, or {expected}"))
}

/// What is allowed, and that it is so because of a server.
fn beside(server: Option<&Path>, allowed: String) -> String {
    match server {
        None => allowed,
        Some(server) => format!("{allowed}, since storage.server is {}", server.display()),
    }
}

fn one_of<T: Copy>(value: &Value, words: &[(&str, T)]) -> Result<T, String> {
    words
        .iter()
        .find(|(word, _)| value.as_str() == Some(word))
        .map(|&(_, meaning)| meaning)
        .ok_or_else(|| {
            let words: Vec<_> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
            format!("one of {}", words.join(", "))
        })
}

fn integer<T>(value: &Value, range: &RangeInclusive<T>) -> Result<T, String>
where
    T: TryFrom<i64> + PartialOrd + fmt::Display,
{
    value
        .as_integer()
        .and_then(|number| T::try_from(number).ok())
        .filter(|number| range.contains(number))
        .ok_or_else(|| format!("an integer from {} to {}", range.start(), range.end()))
}

#[cfg(test)]
mod tests;
