//! `Workers`: a fixed set of threads that help one caller at a time with a list of independent tasks.
//!
//! A job is a borrowed closure and a count; nothing is allocated per job, because jobs are done while a guest stands
//! still. Workers sleep on a condition variable between jobs and take tasks from a shared counter, so a slow core
//! delays at most one task. Rejected: rayon (threads that are not ours to name and pin), scoped threads (starting one
//! costs more than the work), and spinning workers (they would steal the cores that the guests run on).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::thread::{CpuSet, sched_setaffinity};

/// What a worker is asked to do: `(participant, task)`.
type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// A job whose borrow has been forgotten.
#[derive(Clone, Copy)]
struct Job {
    run: *const Task<'static>,
    tasks: usize,
}

// SAFETY: the pointer is only followed between entering and leaving a job, both under the lock of `State`, and
// `Workers::run` does not return before everybody who entered has left; what it points at is Sync.
unsafe impl Send for Job {}

#[derive(Default)]
struct State {
    job: Option<Job>,
    generation: u64,
    /// Workers that entered the present job and have not left it.
    inside: usize,
    panicked: bool,
    closing: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    left: Condvar,
    next_task: AtomicUsize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of a task is reported through `panicked`; the state under the lock stays consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_tasks(&self, run: &Task<'_>, participant: usize, tasks: usize) {
        loop {
            let task = self.next_task.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            run(participant, task);
        }
    }
}

/// The threads. Jobs come from one caller at a time; others wait their turn.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    turn: Mutex<()>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts one thread per entry of `cores`, pinned to that core if one is named. With none the calling thread
    /// does all the work. Where the system cannot start so many threads, there are fewer.
    pub fn new(cores: &[Option<usize>]) -> Self {
        let shared = Arc::new(Shared::default());
        let start = |(number, core): (usize, &Option<usize>)| {
            let (shared, core) = (Arc::clone(&shared), *core);
            std::thread::Builder::new()
                .name(format!("plover-hash-{number}"))
                .spawn(move || {
                    pin(core);
                    serve(&shared, number + 1);
                })
                .inspect_err(
                    |error| tracing::warn!(%error, number, "a hash worker cannot be started; going on with fewer"),
                )
        };
        let threads = cores.iter().enumerate().map_while(|entry| start(entry).ok()).collect();
        Self { shared, turn: Mutex::new(()), threads }
    }

    /// How many threads help the caller.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Calls `run(participant, task)` once for every task below `tasks`, on the calling thread (participant 0) and on
    /// the workers (1 to [`Self::count`]), and returns when all calls have returned. Calls of one participant
    /// follow each other.
    ///
    /// # Panics
    /// When a call panicked.
    pub fn run(&self, tasks: usize, run: &Task<'_>) {
        if self.threads.is_empty() || tasks <= 1 {
            return (0..tasks).for_each(|task| run(0, task));
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.next_task.store(0, Ordering::Relaxed);
        // SAFETY: only the lifetime changes. `Leave` takes the job away and waits for everybody inside, also when a
        // call on this thread panics, so nobody follows the pointer after this function.
        let run_forgotten = unsafe { std::mem::transmute::<&Task<'_>, &Task<'static>>(run) };
        {
            let mut state = self.shared.lock();
            state.generation += 1;
            state.panicked = false;
            state.job = Some(Job { run: run_forgotten, tasks });
            self.shared.changed.notify_all();
        }
        let leave = Leave(&self.shared);
        self.shared.take_tasks(run, 0, tasks);
        drop(leave);
        assert!(!self.shared.lock().panicked, "a hash worker panicked");
    }
}

/// Ends a job: nobody enters it any more, and everybody inside has left.
struct Leave<'a>(&'a Shared);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.job = None;
        while state.inside > 0 {
            state = self.0.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // Tasks that panic are caught, so a thread ends well.
            drop(thread.join());
        }
    }
}

fn pin(core: Option<usize>) {
    let Some(core) = core else { return };
    let mut only = CpuSet::new();
    let pinned = if core < CpuSet::MAX_CPU {
        only.set(core);
        sched_setaffinity(None, &only)
    } else {
        Err(rustix::io::Errno::INVAL)
    };
    if let Err(error) = pinned {
        tracing::warn!(core, %error, "a hash worker cannot be pinned; does this core exist?");
    }
}

fn serve(shared: &Shared, participant: usize) {
    let mut seen = 0;
    let mut state = shared.lock();
    loop {
        if state.closing {
            return;
        }
        let Some(job) = state.job.filter(|_| state.generation != seen) else {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        seen = state.generation;
        state.inside += 1;
        drop(state);
        // SAFETY: this thread has entered the job, so `Workers::run` waits for it and the closure lives.
        let run = unsafe { &*job.run };
        let work = std::panic::AssertUnwindSafe(|| shared.take_tasks(run, participant, job.tasks));
        let outcome = std::panic::catch_unwind(work);
        state = shared.lock();
        state.panicked |= outcome.is_err();
        state.inside -= 1;
        if state.inside == 0 {
            shared.left.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_workers() {
        for workers in [0, 1, 3] {
            let workers = Workers::new(&vec![None; workers]);
            for tasks in [0, 1, 2, 5, 100] {
                let calls: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                workers.run(tasks, &|participant, task| {
                    assert!(participant <= workers.count());
                    calls[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(calls.iter().all(|calls| calls.load(Ordering::Relaxed) == 1), "{tasks} tasks");
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_workers_live_on() {
        let workers = Workers::new(&[None]);
        for _ in 0..50 {
            let job = || {
                workers.run(64, &|_, task| {
                    std::thread::yield_now();
                    assert_ne!(task, 40, "provoked");
                });
            };
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err());
            let done = AtomicUsize::new(0);
            workers.run(64, &|_, _| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 64);
        }
    }

    #[test]
    fn a_worker_runs_on_its_core_and_without_one_anywhere() {
        let allowed = || -> Vec<usize> {
            let set = rustix::thread::sched_getaffinity(None).unwrap();
            (0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect()
        };
        let all = allowed();
        let last = *all.last().unwrap();
        // Cores that do not exist are said and survived.
        for (core, expected) in [(last, vec![last]), (CpuSet::MAX_CPU - 1, all.clone()), (usize::MAX, all.clone())] {
            let workers = Workers::new(&[Some(core)]);
            let found = Mutex::new(None);
            workers.run(2, &|participant, _| {
                if participant == 1 {
                    *found.lock().unwrap() = Some(allowed());
                }
                // The caller holds its task until the worker has had one.
                while found.lock().unwrap().is_none() {
                    std::thread::yield_now();
                }
            });
            assert_eq!(found.into_inner().unwrap(), Some(expected));
        }
    }
}
