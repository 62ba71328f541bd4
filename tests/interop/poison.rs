//! Poison: an allocator whose memory is never zero by chance, so that bytes which nobody wrote show.

use std::alloc::{GlobalAlloc, Layout, System};

/// What fresh memory holds, and what was given back.
const POISON: u8 = 0xDB;

/// The system's allocator, poisoned.
pub struct Poison;

// SAFETY: every call is handed to the system's allocator unchanged; only bytes that the caller owns, or
// has just given up, are written.
unsafe impl GlobalAlloc for Poison {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise about the layout is passed on.
        let at = unsafe { System.alloc(layout) };
        if !at.is_null() {
            // SAFETY: the system has just given us so many bytes.
            unsafe { at.write_bytes(POISON, layout.size()) };
        }
        at
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: `at` came from this allocator, which is the system's, with this layout, and nobody
        // uses it any more.
        unsafe {
            at.write_bytes(POISON, layout.size());
            System.dealloc(at, layout);
        }
    }
}
