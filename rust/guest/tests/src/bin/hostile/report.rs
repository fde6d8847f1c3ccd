// SPDX-License-Identifier: GPL-2.0
//! Which answers were seen. It is shared with the children.

use crate::memory::Answer;
use libc::*;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// MMU_NOTIFY_ALLOC, REG_MR and MR_DESTROY.
    Alloc,
    Reg,
    Destroy,
    /// A method that the object or the call does not have.
    OtherMethod,
    /// The commands by INVOKE_WRITE, and by write().
    Invoke,
    Write,
    OtherCommand,
    /// read() and its kin.
    Read,
    Uring,
    Poll,
    Mmap,
    /// What changes the mapping of the page.
    Page,
    Fcntl,
    /// ioctl() and such of the FD.
    Control,
    /// What is not for this kind of file.
    Refused,
    /// dup() and close().
    Close,
    /// fork(), with a load of the page.
    Fork,
}

const METHODS: &[i32] = &[EBADF, EFAULT, EINVAL, ENOTTY, EPROTONOSUPPORT];

impl Op {
    const ALL: [Self; 17] = {
        use Op::*;
        [
            Alloc,
            Reg,
            Destroy,
            OtherMethod,
            Invoke,
            Write,
            OtherCommand,
            Read,
            Uring,
            Poll,
            Mmap,
            Page,
            Fcntl,
            Control,
            Refused,
            Close,
            Fork,
        ]
    };

    /// The errnos that it may have.
    pub fn errnos(self) -> &'static [i32] {
        match self {
            Op::Alloc => METHODS,
            Op::Reg => &[
                EBADF,
                EFAULT,
                EINVAL,
                ENOTTY,
                EPROTONOSUPPORT,
                ENOENT,
                ENOMEM,
                EOPNOTSUPP,
                EPERM,
            ],
            Op::Destroy => &[EBADF, EFAULT, EINVAL, ENOTTY, EPROTONOSUPPORT, ENOENT],
            Op::OtherMethod => &[
                EBADF,
                EFAULT,
                EINVAL,
                ENOTTY,
                EPROTONOSUPPORT,
                ENOENT,
                EOPNOTSUPP,
                ENOSPC,
            ],
            Op::Invoke => &[
                EBADF,
                EFAULT,
                EINVAL,
                ENOTTY,
                EPROTONOSUPPORT,
                ENOENT,
                ENOMEM,
                EOPNOTSUPP,
                EPERM,
                ENOSPC,
            ],
            Op::Write => &[
                EACCES, EBADF, EFAULT, EINVAL, ENOENT, ENOMEM, EOPNOTSUPP, EPERM, ENOSPC,
            ],
            Op::OtherCommand => &[EACCES, EBADF, EFAULT, EINVAL, EOPNOTSUPP, ENOSPC],
            Op::Read => &[EAGAIN, EFAULT, EINVAL, EOPNOTSUPP, EPERM, ESPIPE, EIO],
            Op::Uring => &[
                EAGAIN, EBADF, EFAULT, EINVAL, EOPNOTSUPP, EPERM, EIO, ESPIPE,
            ],
            Op::Poll => &[EFAULT, EINVAL, EEXIST, ENOENT],
            Op::Mmap => &[
                EACCES, EAGAIN, EBADF, EEXIST, EINVAL, ENODEV, ENOMEM, EOPNOTSUPP, EOVERFLOW, EPERM,
            ],
            Op::Page => &[
                EACCES, EAGAIN, EBADF, EFAULT, EINVAL, EIO, ENOMEM, EPERM, EBUSY, EOPNOTSUPP,
            ],
            Op::Fcntl => &[
                EACCES, EAGAIN, EBADF, EBUSY, EFAULT, EINVAL, ENOTDIR, EPERM, ESRCH, EMFILE,
            ],
            Op::Control => &[
                EAGAIN, EBADF, EFAULT, EINVAL, ENOTTY, EOPNOTSUPP, ENODATA, EPERM, ERANGE,
            ],
            Op::Refused => &[
                EACCES, EBADF, EINVAL, EFAULT, ENODEV, ENOTDIR, EOPNOTSUPP, EPERM, ESPIPE, ENXIO,
                EIO, ENOEXEC, EXDEV, ENOTSOCK,
            ],
            Op::Close => &[EBADF, EINVAL, EMFILE],
            Op::Fork => &[],
        }
    }

    /// Whether any operation may have it, or an object is in use.
    pub fn any(errno: i32) -> bool {
        errno == EBUSY || Self::ALL.iter().any(|op| op.errnos().contains(&errno))
    }

    /// Whether it must succeed, or must not, some time.
    fn succeeds(self) -> Option<bool> {
        match self {
            Op::OtherCommand | Op::Refused => Some(false),
            Op::OtherMethod => None,
            _ => Some(true),
        }
    }
}

/// Memory that children share.
///
/// # Safety
///
/// All bytes zero are a valid `T`.
pub unsafe fn shared<T: Sync>() -> &'static T {
    let protection = PROT_READ | PROT_WRITE;
    let flags = MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE;
    // SAFETY: A new mapping.
    let addr = unsafe {
        mmap(
            std::ptr::null_mut(),
            size_of::<T>(),
            protection,
            flags,
            -1,
            0,
        )
    };
    assert_ne!(addr, MAP_FAILED, "mmap");
    // SAFETY: It is zero, and never unmapped.
    unsafe { &*addr.cast() }
}

const ERRNOS: usize = 160;

/// Counts of answers.
pub struct Report {
    counts: [[AtomicU64; ERRNOS]; Op::ALL.len()],
    /// The calls of this episode.
    pub call: AtomicU64,
    /// The episodes that were of an unprivileged user in a name space of its own.
    pub name_spaces: AtomicU64,
}

impl Report {
    /// Makes one that children share.
    pub fn new() -> &'static Self {
        // SAFETY: Counts may be zero.
        unsafe { shared() }
    }

    pub fn enter(&self, op: Op, answer: Answer) {
        let errno = answer.err().unwrap_or(0) as usize;
        self.counts[op as usize][errno.min(ERRNOS - 1)].fetch_add(1, Relaxed);
        self.call.fetch_add(1, Relaxed);
    }

    pub fn calls(&self) -> u64 {
        self.counts
            .iter()
            .flatten()
            .map(|count| count.load(Relaxed))
            .sum()
    }

    /// Prints a line for each operation and answer.
    pub fn print(&self) {
        for (op, counts) in Op::ALL.iter().zip(&self.counts) {
            for (errno, count) in counts.iter().enumerate() {
                match (count.load(Relaxed), errno) {
                    (0, _) => (),
                    (count, 0) => println!("{:13}{:>9} success", format!("{op:?}"), count),
                    (count, errno) => {
                        let text = std::io::Error::from_raw_os_error(errno as i32);
                        println!("{:13}{count:>9} {text}", format!("{op:?}"));
                    }
                }
            }
        }
    }

    /// The first operation that should have succeeded or failed by now, and has not.
    pub fn untested(&self) -> Option<String> {
        Op::ALL.iter().zip(&self.counts).find_map(|(op, counts)| {
            let seen = |counts: &[AtomicU64]| counts.iter().any(|count| count.load(Relaxed) > 0);
            let (succeeded, failed) = (seen(&counts[..1]), seen(&counts[1..]));
            let can_fail = !op.errnos().is_empty();
            if can_fail && !failed {
                Some(format!("{op:?} never failed"))
            } else if op.succeeds() == Some(true) && !succeeded {
                Some(format!("{op:?} never succeeded"))
            } else {
                None
            }
        })
    }

    /// Checks that each operation was tested, and the part of the calls that succeeded.
    pub fn check(&self) {
        let successes = |counts: &[AtomicU64; ERRNOS]| counts[0].load(Relaxed);
        let part = self.counts.iter().map(successes).sum::<u64>() * 100 / self.calls();
        println!("{} calls, {part} % of them succeeded", self.calls());
        assert!(part >= 5, "expected 5 % to succeed");
        for (op, counts) in Op::ALL.iter().zip(&self.counts) {
            let wrong = op.succeeds() == Some(false) && successes(counts) > 0;
            assert!(!wrong, "{op:?} succeeded");
        }
        if let Some(what) = self.untested() {
            panic!("{what}");
        }
    }
}
