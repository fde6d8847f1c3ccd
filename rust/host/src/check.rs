// SPDX-License-Identifier: GPL-2.0

//! The rules of the kernel that no type expresses, and what tests can see and do besides.
//!
//! A model runs all of its threads, in turn, on one thread of the operating system, so that a
//! thread-local variable of the latter is common to them. Threads change only in operations of
//! loom, none of which is called while the variable is borrowed.

use crate::sync::poll::WaitQueue;
use loom::thread::{self, ThreadId};
use std::{
    cell::RefCell,
    collections::BTreeSet,
    rc::Rc,
    sync::{Arc, Mutex, Weak},
    thread::panicking, //
};

#[derive(Default)]
struct World {
    /// Who holds a spinlock.
    holders: Vec<ThreadId>,
    /// How many allocations have not been freed.
    live: usize,
    /// How many more allocations succeed, if not all.
    allocations: Option<usize>,
    wakeups: usize,
    wait_queues: Vec<Weak<WaitQueue>>,
    asleep: Option<Rc<dyn Fn()>>,
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::default();
}

fn with<R>(f: impl FnOnce(&mut World) -> R) -> R {
    WORLD.with(|world| f(&mut world.borrow_mut()))
}

/// Runs `f` in every order of its threads that matters, or those with at most `preemptions`
/// preemptions, and returns its different results.
///
/// All that `f` allocates has to be freed in the end.
pub fn model<R: Ord + Send + 'static>(
    preemptions: Option<usize>,
    f: impl Fn() -> R + Send + Sync + 'static,
) -> BTreeSet<R> {
    let results = Arc::new(Mutex::new(BTreeSet::new()));
    let inserted = results.clone();
    let mut builder = loom::model::Builder::new();

    builder.preemption_bound = preemptions;
    builder.max_branches = 20_000;
    builder.check(move || {
        with(|world| *world = World::default());

        let result = f();

        assert_eq!(live(), 0, "something leaked");
        assert!(with(|world| world.holders.is_empty()));
        inserted.lock().unwrap().insert(result);
    });
    Arc::into_inner(results).unwrap().into_inner().unwrap()
}

/// Runs `f`, which has no threads, once.
pub fn sequential(f: impl Fn() + Send + Sync + 'static) {
    let f = Arc::new(f);

    model(None, move || {
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
    with(|world| world.live)
}

/// Lets allocations fail after some more have succeeded, or never.
pub fn limit_allocations(allocations: Option<usize>) {
    with(|world| world.allocations = allocations);
}

/// Returns how often waiters have been woken, whether there were any or not.
pub fn wakeups() -> usize {
    with(|world| world.wakeups)
}

/// Calls `f` instead of switching to another thread when one goes to sleep on a wait queue.
pub fn while_asleep(f: Option<Rc<dyn Fn()>>) {
    with(|world| world.asleep = f);
}

/// Lets a thread have a signal pending, or not any more. Wakes it up if it sleeps on a wait queue.
pub fn set_signal_pending(thread: ThreadId, pending: bool) {
    let queues = with(|world| world.wait_queues.clone());

    queues
        .iter()
        .filter_map(Weak::upgrade)
        .for_each(|queue| queue.set_signal_pending(thread, pending));
}

/// Returns whether the current thread holds a spinlock.
pub fn in_atomic() -> bool {
    let current = thread::current().id();

    with(|world| world.holders.contains(&current))
}

/// Panics if the current thread holds a spinlock.
#[track_caller]
pub fn might_sleep() {
    // One panic is enough, and after some there is no current thread.
    assert!(panicking() || !in_atomic(), "under a spinlock");
}

pub(crate) fn locked() {
    let current = thread::current().id();

    with(|world| world.holders.push(current));
}

pub(crate) fn unlocked() {
    if panicking() {
        return;
    }
    let current = thread::current().id();

    with(|world| world.holders.retain(|holder| *holder != current));
}

pub(crate) fn woken() {
    might_sleep();
    with(|world| world.wakeups += 1);
}

pub(crate) fn new_wait_queue(queue: &Arc<WaitQueue>) {
    with(|world| world.wait_queues.push(Arc::downgrade(queue)));
}

pub(crate) fn sleep_hook() -> Option<Rc<dyn Fn()>> {
    with(|world| world.asleep.clone())
}

/// One allocation.
pub(crate) struct Allocation(());

impl Allocation {
    pub(crate) fn new() -> Result<Self, crate::alloc::AllocError> {
        might_sleep();
        with(|world| {
            match &mut world.allocations {
                Some(0) => return Err(crate::alloc::AllocError),
                Some(left) => *left -= 1,
                None => {}
            }
            world.live += 1;
            Ok(Self(()))
        })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        might_sleep();
        with(|world| world.live -= 1);
    }
}
