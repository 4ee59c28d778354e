// Package uring writes to file descriptors by Linux's io_uring: many writes by one
// system call. It has the one operation that is needed, and no more of io_uring.
package uring

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Entries is how many writes a ring takes before it must be submitted.
const Entries = 128

// From linux/io_uring.h.
const (
	setupSubmitAll  = 1 << 7 // a bad entry doesn't keep those behind it from being submitted
	featSingleMmap  = 1 << 0
	offSQRing       = 0
	offSQEs         = 0x10000000
	opWritev        = 2
	enterGetEvents  = 1 << 0
	completionBytes = 16
)

// entry is struct io_uring_sqe, as a write uses it.
type entry struct {
	op, flags byte
	_         uint16
	fd        int32
	offset    uint64
	addr      uint64
	len       uint32
	rwFlags   uint32
	user      uint64
	_         [3]uint64
}

// completion is struct io_uring_cqe.
type completion struct {
	user  uint64
	res   int32
	flags uint32
}

// params is struct io_uring_params.
type params struct {
	sqEntries, cqEntries, flags, cpu, idle, features, wq uint32
	_                                                    [3]uint32
	sq                                                   struct {
		head, tail, mask, entries, flags, dropped, array uint32
		_                                                uint32
		_                                                uint64
	}
	cq struct {
		head, tail, mask, entries, overflow, cqes, flags uint32
		_                                                uint32
		_                                                uint64
	}
}

// Ring is a ring of the kernel's. One goroutine uses it at a time.
type Ring struct {
	fd             int
	mem, sqes      []byte // of the kernel
	entries        []entry
	sqTail         *uint32
	sqHead         *uint32
	cqHead, cqTail *uint32
	cqMask         uint32
	cqes           unsafe.Pointer

	queued  int
	held    [Entries][]unix.Iovec // of the queued writes: alive, and on no stack
	results [Entries]int32
}

// New makes a ring.
func New() (*Ring, error) {
	p := params{flags: setupSubmitAll}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, Entries, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, fmt.Errorf("io_uring_setup: %w", errno)
	}
	r := &Ring{fd: int(fd)}
	if err := r.mmap(&p); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *Ring) mmap(p *params) (err error) {
	if p.features&featSingleMmap == 0 {
		return fmt.Errorf("io_uring: %w", unix.ENOSYS) // Linux before 5.4
	}
	size := max(int(p.sq.array)+int(p.sqEntries)*4, int(p.cq.cqes)+int(p.cqEntries)*completionBytes)
	if r.mem, err = unix.Mmap(r.fd, offSQRing, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return fmt.Errorf("map io_uring: %w", err)
	}
	if r.sqes, err = unix.Mmap(r.fd, offSQEs, int(p.sqEntries)*int(unsafe.Sizeof(entry{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return fmt.Errorf("map io_uring: %w", err)
	}
	at := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.mem[off])) }
	r.sqHead, r.sqTail, r.cqHead, r.cqTail = at(p.sq.head), at(p.sq.tail), at(p.cq.head), at(p.cq.tail)
	r.cqMask, r.cqes = *at(p.cq.mask), unsafe.Pointer(&r.mem[p.cq.cqes])
	r.entries = unsafe.Slice((*entry)(unsafe.Pointer(&r.sqes[0])), p.sqEntries)
	array := unsafe.Slice(at(p.sq.array), p.sqEntries)
	for i := range array {
		array[i] = uint32(i)
	}
	return nil
}

// Close frees the ring.
func (r *Ring) Close() error {
	var errs []error
	for _, m := range [][]byte{r.mem, r.sqes} {
		if m != nil {
			errs = append(errs, unix.Munmap(m))
		}
	}
	r.mem, r.sqes = nil, nil
	return errors.Join(append(errs, unix.Close(r.fd))...)
}

// Writev queues a write, at most [Entries] of them before a Submit. What iov describes, and iov
// itself, stay as they are until Submit has returned.
func (r *Ring) Writev(fd uintptr, iov []unix.Iovec) {
	i := (*r.sqTail + uint32(r.queued)) % uint32(len(r.entries))
	// A write that would have to wait fails at once: one that waited would be overtaken.
	r.entries[i] = entry{op: opWritev, fd: int32(fd), addr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(iov)))),
		len: uint32(len(iov)), rwFlags: unix.RWF_NOWAIT, user: uint64(r.queued)}
	r.held[r.queued] = iov
	r.queued++
}

// Submit makes the queued writes, in their order, and returns what came of each: the
// number of bytes, or a negative errno. The slice is valid until the next Submit. With
// an error it has the first writes only; none of the others was made, and they
// aren't queued any more.
func (r *Ring) Submit() ([]int32, error) {
	n := r.queued
	r.queued = 0
	atomic.StoreUint32(r.sqTail, *r.sqTail+uint32(n))
	done, err := r.enter(n)
	if err != nil {
		// The kernel reads entries in a call only, so that those it hasn't taken can be
		// taken back.
		atomic.StoreUint32(r.sqTail, atomic.LoadUint32(r.sqHead))
	}
	clear(r.held[:n])
	return r.results[:done], err
}

// enter lets the kernel take n entries, and waits for all that it takes.
func (r *Ring) enter(n int) (taken int, err error) {
	// Writes that mustn't wait end while they are taken. So this call never sleeps, and the
	// runtime need not lend the processor to another thread.
	got, _, errno := unix.RawSyscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(n), 0, 0, 0, 0)
	for done := 0; ; {
		if errno == 0 {
			taken += int(got)
		}
		done += r.reap()
		switch {
		case done == n:
			return n, nil
		case errno != 0 && errno != unix.EINTR && done == taken:
			return taken, os.NewSyscallError("io_uring_enter", errno)
		}
		// What was taken ends by itself; until then its memory is the kernel's.
		got, _, errno = unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(n-taken), uintptr(n-done), enterGetEvents, 0, 0)
	}
}

// reap takes what has ended.
func (r *Ring) reap() int {
	head, tail := *r.cqHead, atomic.LoadUint32(r.cqTail)
	for ; head != tail; head++ {
		c := (*completion)(unsafe.Add(r.cqes, (head&r.cqMask)*completionBytes))
		r.results[c.user%Entries] = c.res
	}
	n := int(tail - *r.cqHead)
	atomic.StoreUint32(r.cqHead, head)
	return n
}
