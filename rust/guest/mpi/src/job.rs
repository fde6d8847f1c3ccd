// SPDX-License-Identifier: GPL-2.0
//! MPI jobs of two ranks, and what they print.

use crate::Setup;
use anyhow::{Context as _, Result};
use clap::ValueEnum;
use std::{fmt, fs, fs::File, path::Path, process::Command};

/// An MPI library and what it transfers over.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stack {
    /// Open MPI over UCX
    #[value(name = "openmpi-ucx")]
    OpenMpiUcx,
    /// Open MPI over libfabric
    #[value(name = "openmpi-libfabric")]
    OpenMpiOfi,
    /// MPICH over UCX
    #[value(name = "mpich-ucx")]
    MpichUcx,
}

impl Stack {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::OpenMpiUcx, Self::OpenMpiOfi, Self::MpichUcx];

    /// Its name, in the names of tests and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::OpenMpiUcx => "openmpi-ucx",
            Self::OpenMpiOfi => "openmpi-libfabric",
            Self::MpichUcx => "mpich-ucx",
        }
    }

    /// The library that caches registrations.
    fn cache(self) -> &'static str {
        match self {
            Self::OpenMpiOfi => "libfabric.so",
            _ => "libucs.so",
        }
    }

    /// Whether UCX can be asked to check that the pages of what it finds in its cache
    /// are still those that were registered.
    pub fn checks_pages(self) -> bool {
        self != Self::OpenMpiOfi
    }

    /// The suffix of programs that are built for its MPI.
    pub fn mpi(self) -> &'static str {
        match self {
            Self::MpichUcx => "mpich",
            _ => "openmpi",
        }
    }

    /// The command that starts two ranks.
    fn launcher(self) -> Vec<&'static str> {
        const OPEN_MPI: [&str; 9] = [
            "mpirun.openmpi",
            "-n",
            "2",
            "--oversubscribe",
            "--bind-to",
            "none",
            "--mca",
            "btl",
            "self",
        ];
        match self {
            // UCX is for Mellanox devices only, unless told otherwise.
            Self::OpenMpiUcx => [
                &OPEN_MPI[..],
                &["--mca", "pml", "ucx", "--mca", "osc", "ucx"],
                &["--mca", "opal_common_ucx_tls", "any"],
                &["--mca", "opal_common_ucx_devices", "any"],
            ]
            .concat(),
            Self::OpenMpiOfi => [
                &OPEN_MPI[..],
                &["--mca", "pml", "cm", "--mca", "mtl", "ofi"],
                &["--mca", "osc", "pt2pt"],
                &["--mca", "mtl_ofi_provider_include", "verbs;ofi_rxm"],
            ]
            .concat(),
            Self::MpichUcx => vec!["mpiexec.hydra", "-n", "2"],
        }
    }

    /// What makes it run over soft-RoCE.
    fn environment(self, device: &str) -> Vec<(&'static str, String)> {
        let ucx = || {
            vec![
                ("UCX_TLS", "rc_v,ud_v,self".into()),
                ("UCX_NET_DEVICES", format!("{device}:1")),
                // The UD transport drops what comes from an IPv4 address of soft-RoCE.
                ("UCX_IB_GID_INDEX", "2".into()),
            ]
        };
        match self {
            Self::OpenMpiUcx => ucx(),
            Self::MpichUcx => [ucx(), vec![("MPIR_CVAR_NOLOCAL", "1".into())]].concat(),
            // For more it asks for a larger completion queue than soft-RoCE has.
            Self::OpenMpiOfi => vec![("FI_UNIVERSE_SIZE", "8".into())],
        }
    }
}

/// Transfers of more than 16 KiB are not copied, as they would be over soft-RoCE by default.
pub const ZERO_COPY: [(&str, &str); 2] = [
    ("UCX_RNDV_THRESH", "16k"),
    ("FI_OFI_RXM_SAR_LIMIT", "16384"),
];

/// Where the libraries under MPI come from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Libraries {
    /// The distribution's
    Distribution,
    /// The patched ones
    Ours,
}

impl Libraries {
    /// In the names of tests and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Distribution => "before",
            Self::Ours => "after",
        }
    }
}

/// What a program says of a change.
#[derive(Clone, PartialEq, Eq)]
pub enum Verdict {
    /// All data was right.
    Right,
    /// Some was wrong, and how.
    Wrong(String),
    /// There was no answer, and why.
    Unknown(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Right => write!(f, "right"),
            Self::Wrong(how) => write!(f, "wrong: {how}"),
            Self::Unknown(why) => write!(f, "{why}"),
        }
    }
}

/// What a job printed, after it has ended.
pub struct Job {
    /// Standard output and error of both ranks
    pub output: String,
    /// How it ended, if not well
    pub failure: Option<String>,
}

impl Job {
    /// Runs PROGRAM, which is one word or more, and keeps its output as a file NAME.
    pub fn run(
        setup: &Setup,
        stack: Stack,
        libraries: Libraries,
        name: &str,
        program: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let log = setup.logs.join(format!(
            "mpi-{}-{}-{name}.log",
            stack.name(),
            libraries.name()
        ));
        let file = File::create(&log).with_context(|| format!("{}", log.display()))?;
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after=10", &setup.timeout.to_string()])
            .args(stack.launcher())
            .arg(setup.programs.join(program[0]))
            .args(&program[1..])
            .env("HOME", "/tmp")
            .env("TMPDIR", "/tmp")
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .env("OMPI_MCA_mpi_warn_on_fork", "0")
            .env_remove("LD_LIBRARY_PATH")
            .envs(stack.environment(&setup.device))
            .envs(environment.iter().copied())
            .stdout(file.try_clone()?)
            .stderr(file);
        if libraries == Libraries::Ours {
            command.env("LD_LIBRARY_PATH", &setup.ours);
        }
        let status = command.status().context("timeout")?;
        // Error messages may have any bytes.
        let output = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let ended = output.lines().any(|line| line == "# end");
        let failure = match status.code() {
            Some(0) if ended => None,
            Some(0) => Some("the program did not end".into()),
            Some(124 | 137) => Some(format!("stopped after {} s", setup.timeout)),
            _ => Some(format!("{status}")),
        };
        Ok(Self { output, failure })
    }

    /// What the job says of NAME, which is the first words of a line.
    pub fn verdict(&self, name: &str) -> Verdict {
        let found = self.output.lines().find_map(|line| {
            let rest = line.strip_prefix(name)?.strip_prefix(' ')?;
            Some(rest.split_once(": ").unwrap_or((rest, "")))
        });
        match (found, &self.failure) {
            (Some(("right", _)), None) => Verdict::Right,
            (Some(("wrong", how)), _) => Verdict::Wrong(how.into()),
            (Some((word, how)), None) => Verdict::Unknown(format!("{word}: {how}")),
            (_, Some(why)) => Verdict::Unknown(why.clone()),
            (None, None) => Verdict::Unknown("no result".into()),
        }
    }

    /// The rest of the line of NAME, for the reader.
    pub fn detail(&self, name: &str) -> &str {
        self.output
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_default()
            .trim()
    }

    /// Whether the job ran with the libraries that were asked for: libibverbs, and the
    /// one that caches registrations.
    pub fn check_libraries(&self, setup: &Setup, stack: Stack, libraries: Libraries) -> Verdict {
        for library in ["libibverbs.so", stack.cache()] {
            let mut paths = self
                .output
                .lines()
                .filter_map(|line| line.strip_prefix("# library "));
            let Some(path) = paths.find(|path| path.contains(library)) else {
                return Verdict::Unknown(format!("{library} is not loaded"));
            };
            let ours = setup
                .ours
                .split(':')
                .any(|folder| Path::new(path).parent() == Some(Path::new(folder)));
            if ours != (libraries == Libraries::Ours) {
                return Verdict::Wrong(format!("loaded {path}"));
            }
        }
        Verdict::Right
    }
}
