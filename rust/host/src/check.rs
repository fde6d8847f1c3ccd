// SPDX-License-Identifier: GPL-2.0

//! Checks kernel rules that types cannot express (no sleeping or allocating under a spinlock), and
//! hooks for the tests.
//!
//! A model runs all of its threads, in turn, on one thread of the operating system, so that a
//! thread-local variable of the latter is common to them. Threads change only in operations of
//! loom, none of which is called while the variable is borrowed.

use crate::{
    error::{Error, Result},
    sync::poll::WaitQueue, //
};
use loom::thread::{self, ThreadId};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    env,
    fmt::Debug,
    fs::OpenOptions,
    io::Write,
    rc::Rc,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::panicking, //
};

#[derive(Default)]
struct ModelState {
    /// Threads that hold a spinlock.
    atomic: Vec<ThreadId>,
    /// Threads that hold a mutex.
    mutex: Vec<ThreadId>,
    locks: usize,
    /// How many allocations have not been freed.
    live: usize,
    /// How many more allocations succeed, if not all.
    allocations: Option<usize>,
    notifier_error: Option<Error>,
    deferred: usize,
    wakeups: usize,
    wait_queues: Vec<Weak<WaitQueue>>,
    asleep: Option<Rc<dyn Fn()>>,
    /// Threads that are killed when they wake up.
    doomed: Vec<ThreadId>,
    killed: Vec<ThreadId>,
}

thread_local! {
    static STATE: RefCell<ModelState> = RefCell::default();
}

fn with<R>(f: impl FnOnce(&mut ModelState) -> R) -> R {
    STATE.with(|state| f(&mut state.borrow_mut()))
}

/// In one run of a model. loom panics if this is not enough.
const MAX_BRANCHES: usize = 100_000;

fn run<R: Ord + Send + 'static>(
    preemptions: Option<usize>,
    f: impl Fn() -> R + Send + Sync + 'static,
) -> (BTreeSet<R>, usize) {
    let results = Arc::new(Mutex::new(BTreeSet::new()));
    let inserted = results.clone();
    let interleavings = Arc::new(AtomicUsize::new(0));
    let counted = interleavings.clone();
    let mut builder = loom::model::Builder::new();

    builder.preemption_bound = preemptions;
    builder.max_branches = MAX_BRANCHES;
    builder.check(move || {
        counted.fetch_add(1, Relaxed);
        with(|state| *state = ModelState::default());

        let result = f();

        assert_eq!(live(), 0, "something leaked");
        assert!(with(
            |state| state.atomic.is_empty() && state.mutex.is_empty()
        ));
        inserted.lock().unwrap().insert(result);
    });
    (
        Arc::into_inner(results).unwrap().into_inner().unwrap(),
        interleavings.load(Relaxed),
    )
}

/// Runs `f` in every order of its threads that matters, or those with at most `preemptions`
/// preemptions, and returns its different results.
///
/// All that `f` allocates has to be freed in the end. Reports how many orders there were.
pub fn model<R: Debug + Ord + Send + 'static>(
    preemptions: Option<usize>,
    f: impl Fn() -> R + Send + Sync + 'static,
) -> BTreeSet<R> {
    let (results, interleavings) = run(preemptions, f);
    let bound = preemptions.map_or("none".into(), |n| format!("{n} preemptions"));
    let repairs = if repairs() {
        ""
    } else {
        ", without the repair of atomics"
    };

    report(&format!(
        "{interleavings} interleavings, bound: {bound}{repairs}, results: {results:?}"
    ));
    results
}

/// Runs `f` twice, for a model that is too large in every order with the repair of atomics, see
/// [`crate::sync::atomic`]: without it and a bound, where loom misses orders, and with both.
pub fn model_twice<R: Debug + Ord + Send + 'static>(
    preemptions: usize,
    f: impl Fn() -> R + Send + Sync + 'static,
) -> BTreeSet<R> {
    let f = Arc::new(f);
    let again = f.clone();

    REPAIRS.set(false);
    let mut results = model(None, move || f());
    REPAIRS.set(true);
    results.append(&mut model(Some(preemptions), move || again()));
    results
}

thread_local! {
    static REPAIRS: Cell<bool> = const { Cell::new(true) };
}

/// Returns whether accesses of atomics are announced.
pub(crate) fn repairs() -> bool {
    REPAIRS.get()
}

/// Prints what a test has done. Appends it to the file that the environment names, if it does.
pub fn report(what: &str) {
    let line = format!("{}: {what}\n", std::thread::current().name().unwrap_or("?"));

    print!("{line}");
    if let Some(path) = env::var_os("UVERBS_MMU_NOTIFY_REPORT") {
        let file = OpenOptions::new().create(true).append(true).open(path);

        // At once, as other tests append to it.
        file.unwrap().write_all(line.as_bytes()).unwrap();
    }
}

/// Runs `f`, which has no threads, once.
pub fn sequential(f: impl Fn() + Send + Sync + 'static) {
    let f = Arc::new(f);

    run(None, move || {
        let f = f.clone();
        // The first thread of a model has a stack of a few pages.
        let thread = thread::Builder::new()
            .stack_size(1 << 20)
            .spawn(move || f());

        thread.unwrap().join().unwrap();
    });
}

/// Returns how many allocations have not been freed.
pub fn live() -> usize {
    with(|state| state.live)
}

/// Lets allocations fail after some more have succeeded, or never.
pub fn limit_allocations(allocations: Option<usize>) {
    with(|state| state.allocations = allocations);
}

/// Lets insertions of notifiers, and their preparation, fail with `error`.
pub fn fail_notifiers(error: Option<Error>) {
    with(|state| state.notifier_error = error);
}

/// Returns how many insertions of notifiers have been deferred.
pub fn deferred() -> usize {
    with(|state| state.deferred)
}

/// Returns how often a spinlock or a mutex has been locked.
pub fn locks() -> usize {
    with(|state| state.locks)
}

/// Returns how often waiters have been woken, whether there were any or not.
pub fn wakeups() -> usize {
    with(|state| state.wakeups)
}

/// Calls `f` instead of switching to another thread when one goes to sleep on a wait queue.
pub fn while_asleep(f: Option<Rc<dyn Fn()>>) {
    with(|state| state.asleep = f);
}

/// Sets or clears a pending signal of a thread. Wakes it up if it sleeps on a wait queue.
pub fn set_signal_pending(thread: ThreadId, pending: bool) {
    let queues = with(|state| state.wait_queues.clone());

    queues
        .iter()
        .filter_map(Weak::upgrade)
        .for_each(|queue| queue.set_signal_pending(thread, pending));
}

/// Kills the current thread when it wakes up from a wait queue the next time.
pub fn kill_on_wakeup() {
    let current = thread::current().id();

    with(|state| state.doomed.push(current));
}

/// Returns whether the current thread holds a spinlock.
pub fn in_atomic() -> bool {
    let current = thread::current().id();

    with(|state| state.atomic.contains(&current))
}

/// Panics if the current thread holds a spinlock.
#[track_caller]
pub fn might_sleep() {
    // One panic is enough, and after some there is no current thread.
    assert!(panicking() || !in_atomic(), "under a spinlock");
}

/// Panics if the current thread holds a spinlock or a mutex.
#[track_caller]
pub fn might_sleep_long() {
    might_sleep();
    assert!(panicking() || !holds_mutex(), "with a mutex");
}

fn holds_mutex() -> bool {
    let current = thread::current().id();

    with(|state| state.mutex.contains(&current))
}

/// A kind of lock that a thread holds at most one of.
pub(crate) enum Held {
    Spinlock,
    Mutex,
}

impl Held {
    fn threads(self, state: &mut ModelState) -> &mut Vec<ThreadId> {
        match self {
            Self::Spinlock => &mut state.atomic,
            Self::Mutex => &mut state.mutex,
        }
    }

    pub(crate) fn locked(self) {
        let current = thread::current().id();

        with(|state| {
            state.locks += 1;
            self.threads(state).push(current);
        });
    }

    pub(crate) fn unlocked(self) {
        if panicking() {
            return;
        }
        let current = thread::current().id();

        with(|state| self.threads(state).retain(|holder| *holder != current));
    }
}

pub(crate) fn woken() {
    might_sleep();
    with(|state| state.wakeups += 1);
}

/// Returns whether the current thread, which has woken up, is killed.
pub(crate) fn killed_on_wakeup() -> bool {
    let current = thread::current().id();

    with(|state| {
        let doomed = state.doomed.contains(&current);

        if doomed {
            state.killed.push(current);
        }
        doomed
    })
}

/// Returns whether the current thread has been killed.
pub(crate) fn killed() -> bool {
    let current = thread::current().id();

    with(|state| state.killed.contains(&current))
}

pub(crate) fn new_wait_queue(queue: &Arc<WaitQueue>) {
    with(|state| state.wait_queues.push(Arc::downgrade(queue)));
}

pub(crate) fn sleep_hook() -> Option<Rc<dyn Fn()>> {
    with(|state| state.asleep.clone())
}

pub(crate) fn notifier_result() -> Result {
    with(|state| state.notifier_error).map_or(Ok(()), Err)
}

pub(crate) fn insertion_deferred() {
    with(|state| state.deferred += 1);
}

/// One allocation.
pub(crate) struct Allocation(());

impl Allocation {
    pub(crate) fn new() -> Result<Self, crate::alloc::AllocError> {
        might_sleep();
        with(|state| {
            match &mut state.allocations {
                Some(0) => return Err(crate::alloc::AllocError),
                Some(left) => *left -= 1,
                None => {}
            }
            state.live += 1;
            Ok(Self(()))
        })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        might_sleep();
        with(|state| state.live -= 1);
    }
}
