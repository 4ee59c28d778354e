package router

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// tap is the Ethernet port of a member: the kernel itself resolves neighbours,
// so whole frames pass through unchanged.
type tap struct {
	id      NetworkID
	name    string
	file    *os.File
	link    *link
	done    chan struct{} // closed when the reader has ended
	broken  atomic.Bool   // the reader gave up
	closed  atomic.Bool
	dropped atomic.Uint64 // frames that the kernel or the node refused
}

const (
	tapBatch    = 64
	tapHeadroom = 64
	maxFrame    = 10024 + 18 // the largest network MTU and an Ethernet header
)

// openTAP creates the port of a network, in the network namespace of the
// calling thread.
func openTAP(id NetworkID, name string, mac MAC, log *slog.Logger) (_ *tap, err error) {
	fd, err := openTunFD(name, unix.IFF_TAP|unix.IFF_NO_PI)
	if err != nil {
		return nil, err
	}
	t := &tap{id: id, name: name, file: os.NewFile(uintptr(fd), tunPath), done: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.file.Close())
		}
	}()
	if t.link, err = openLink(name, log); err != nil {
		return nil, err
	}
	t.link.ownsMAC = true
	if err := t.link.nl.LinkSetHardwareAddr(t.link.l, mac[:]); err != nil {
		t.link.nl.Close()
		return nil, fmt.Errorf("set MAC of %q: %w", name, err)
	}
	return t, nil
}

// read passes frames from the kernel to the node until the file is closed.
func (t *tap) read(node Node) error {
	defer close(t.done)
	raw, err := t.file.SyscallConn()
	if err != nil {
		return err
	}
	store := make([]byte, tapBatch*(tapHeadroom+maxFrame))
	bufs, sizes := make([][]byte, tapBatch), make([]int, tapBatch)
	for i := range bufs {
		bufs[i] = store[i*(tapHeadroom+maxFrame):][: tapHeadroom+maxFrame : tapHeadroom+maxFrame]
	}
	for {
		n, failed := 0, error(nil)
		// One wait, then all that is there: batches under load, no delay without.
		err := raw.Read(func(fd uintptr) bool {
			for n < tapBatch {
				m, err := unix.Read(int(fd), bufs[n][tapHeadroom:])
				switch {
				case errors.Is(err, unix.EINTR):
					continue
				case errors.Is(err, unix.EAGAIN):
					return n > 0
				case err != nil:
					failed = err
					return true
				case m == 0:
					failed = io.EOF
					return true
				}
				sizes[n] = m
				n++
			}
			return true
		})
		if n > 0 {
			sent, err := node.WriteFrames(uint64(t.id), bufs[:n], sizes[:n], tapHeadroom)
			if err != nil {
				return fmt.Errorf("send frames of %q: %w", t.name, err)
			}
			t.dropped.Add(uint64(n - sent))
		}
		switch {
		case t.closed.Load():
			return nil // asked to stop: err is shutdown noise
		case err != nil:
			return fmt.Errorf("read %q: %w", t.name, err)
		case failed != nil:
			return fmt.Errorf("read %q: %w", t.name, failed)
		}
	}
}

// deliver passes frames from the node to the kernel. A frame that the kernel
// refuses (interface down, queue full) is lost, as on any wire.
func (t *tap) deliver(frames [][]byte) {
	for _, f := range frames {
		if _, err := t.file.Write(f); err != nil {
			t.dropped.Add(1)
		}
	}
}

// close ends the port and waits for its reader.
func (t *tap) close(ctx context.Context) error {
	t.link.undo()
	t.closed.Store(true)
	err := t.file.Close()
	select {
	case <-t.done:
	case <-ctx.Done():
	}
	return err
}
