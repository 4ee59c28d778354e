package hostproxy

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	streamBuffer = 16 << 10
	maxDatagram  = 65535
)

// buffers are those of one size, held only while there is something in them: most
// connections are idle most of the time.
type buffers struct{ sync.Pool }

func newBuffers(size int) *buffers {
	return &buffers{sync.Pool{New: func() any { b := make([]byte, size); return &b }}}
}

var errReset = errors.New("connection reset")

// source reads a connection, with a buffer that it takes when there is something to
// read.
type source struct {
	conn   net.Conn
	pool   *buffers
	raw    syscall.RawConn // nil unless it is the kernel's
	wait   func()          // nil unless the connection can wait without a buffer
	try    func(fd uintptr) bool
	b      *[]byte
	n      int
	err    error
	stream bool
}

func newSource(c net.Conn, pool *buffers) *source {
	s := &source{conn: c, pool: pool}
	_, s.stream = c.(interface{ CloseWrite() error })
	if k, ok := c.(syscall.Conn); ok {
		s.raw, _ = k.SyscallConn() // an error leaves it nil
	}
	if w, ok := c.(interface{ WaitRead() }); ok {
		s.wait = w.WaitRead
	}
	s.try = func(fd uintptr) bool {
		s.take()
		for {
			if s.n, s.err = unix.Read(int(fd), *s.b); s.err != unix.EINTR {
				break
			}
		}
		if s.err == unix.EAGAIN {
			s.give()
			return false
		}
		return true
	}
	return s
}

func (s *source) take() { s.b = s.pool.Get().(*[]byte) }

func (s *source) give() {
	if s.b != nil {
		s.pool.Put(s.b)
		s.b = nil
	}
}

// next hands what comes next to use, io.EOF to its caller at the end of a stream.
func (s *source) next(use func([]byte) error) error {
	defer s.give()
	if s.raw != nil {
		if err := s.raw.Read(s.try); err != nil {
			return err
		}
	} else {
		if s.wait != nil {
			s.wait()
		}
		s.take()
		s.n, s.err = s.conn.Read(*s.b)
	}
	if s.n > 0 || s.err == nil && !s.stream { // a datagram may be empty
		if err := use((*s.b)[:s.n]); err != nil {
			return err
		}
	} else if s.err == nil {
		return io.EOF
	}
	return s.err
}

// abort ends a connection so that the other end sees a reset.
func abort(c net.Conn) {
	switch c := c.(type) {
	case *net.TCPConn:
		_ = c.SetLinger(0)
	case interface{ Abort() }:
		c.Abort()
	}
	_ = c.Close()
}

// awaitReset waits for the reset of a connection whose end was read, as a client's
// that was killed while it waited for the rest of an answer. It ends at the
// connection's read deadline, too.
func awaitReset(c net.Conn) error {
	k, ok := c.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := k.SyscallConn()
	if err != nil {
		return err
	}
	err = raw.Read(func(fd uintptr) bool {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		return err != nil || info.State == unix.BPF_TCP_CLOSE
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err == nil {
		err = errReset
	}
	return err
}

// past is a deadline that has passed.
var past = time.Unix(1, 0)
