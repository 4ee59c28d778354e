package tuntap

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"ztgate/internal/uring"
	"ztgate/router/host/offload"
)

// Method is how packets are written to an interface.
type Method string

// The methods.
const (
	Writev  Method = "writev"   // a system call for each packet
	IOUring Method = "io_uring" // one for a batch
)

// Probe returns nil if this kernel lets us write to interfaces by [IOUring], in the
// order in which the packets are given to it; otherwise the error says why not.
func Probe() error {
	r, err := uring.New()
	if err != nil {
		return explained(err)
	}
	defer r.Close()
	// A descriptor that has no interface yet refuses every packet.
	fd, err := unix.Open(Path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", Path, err)
	}
	defer unix.Close(fd)
	r.Writev(uintptr(fd), []unix.Iovec{iovec(make([]byte, offload.HeaderLen))})
	results, err := r.Submit()
	if err != nil {
		return explained(err)
	}
	return judge(results[0])
}

// judge takes the result of a write to a descriptor that has no interface.
func judge(res int32) error {
	switch errno := unix.Errno(-res); errno {
	case unix.EBADFD:
		return nil
	case unix.EOPNOTSUPP:
		// Its writes would be made by other threads, in any order.
		return errors.New("this kernel can't write to interfaces by io_uring without waiting (Linux 6.4 can)")
	default:
		return fmt.Errorf("a write by io_uring ends otherwise than it must: %w", errno)
	}
}

// explained says who may have refused.
func explained(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: seccomp, as in most containers, or kernel.io_uring_disabled forbids it", err)
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: this kernel is too old", err)
	}
	return err
}
