package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"ztgate/router/host/offload"
	"ztgate/router/host/tuntap"
	"ztgate/zerotier/ztnode"
)

// TAP is the Ethernet port of a member: the kernel itself resolves neighbours,
// so whole frames pass through unchanged.
type TAP struct {
	ID      ztnode.NetworkID
	Name    string
	file    *os.File
	raw     syscall.RawConn
	Link    *Link
	done    chan struct{} // closed when the reader has ended
	Broken  atomic.Bool   // the reader gave up
	closed  atomic.Bool
	dropped atomic.Uint64 // frames that the kernel or the node refused
	writers *tuntap.Writers
}

const (
	tapBatch    = 64
	tapHeadroom = 64
	maxFrame    = 10024 + 18 // the largest network MTU and an Ethernet header
)

// OpenTAP creates the port of a network, in the network namespace of the
// calling thread.
func OpenTAP(id ztnode.NetworkID, name string, mac ztnode.MAC, how tuntap.Method, log *slog.Logger) (_ *TAP, err error) {
	fd, err := tuntap.OpenFD(name, unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR)
	if err != nil {
		return nil, err
	}
	udp, err := tuntap.SetOffloads(fd)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set offloads of %q: %w", name, err)
	}
	t := &TAP{ID: id, Name: name, file: os.NewFile(uintptr(fd), tuntap.Path), done: make(chan struct{}),
		writers: tuntap.NewWriters(offload.EthernetLen, udp, how)}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.file.Close())
		}
	}()
	if t.raw, err = t.file.SyscallConn(); err != nil {
		return nil, err
	}
	if t.Link, err = OpenLink(name, log); err != nil {
		return nil, err
	}
	t.Link.ownsMAC = true
	if err := t.Link.nl.LinkSetHardwareAddr(t.Link.l, mac[:]); err != nil {
		t.Link.nl.Close()
		return nil, fmt.Errorf("set MAC of %q: %w", name, err)
	}
	return t, nil
}

// frameWriter takes Ethernet frames into a network, as netstack.Overlay does.
type frameWriter interface {
	WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error)
}

// Read passes frames from the kernel to the node until the file is closed.
func (t *TAP) Read(node frameWriter) error {
	defer close(t.done)
	r := tuntap.NewReader(offload.EthernetLen)
	bufs, sizes := make([][]byte, tapBatch), make([]int, tapBatch)
	store := make([]byte, tapBatch*(tapHeadroom+maxFrame))
	for i := range bufs {
		bufs[i] = store[i*(tapHeadroom+maxFrame):][: tapHeadroom+maxFrame : tapHeadroom+maxFrame]
	}
	for {
		n, err := r.ReadBatch(t.raw, bufs, sizes, tapHeadroom)
		if n > 0 {
			sent, werr := node.WriteFrames(uint64(t.ID), bufs[:n], sizes[:n], tapHeadroom)
			t.dropped.Add(uint64(n - sent))
			if werr != nil {
				err = werr
			}
		}
		switch {
		case t.closed.Load():
			return nil // asked to stop: err is shutdown noise
		case errors.Is(err, offload.ErrPacket):
			t.dropped.Add(1)
		case err != nil:
			return fmt.Errorf("read %q: %w", t.Name, err)
		}
	}
}

// Deliver passes frames from the node to the kernel. A frame that the kernel
// refuses (interface down, queue full) is lost, as on any wire.
func (t *TAP) Deliver(frames [][]byte) {
	n, _ := t.writers.Write(t.raw, frames, 0)
	t.dropped.Add(uint64(len(frames) - n))
}

// Close ends the port and waits for its reader.
func (t *TAP) Close(ctx context.Context) error {
	t.Link.Undo()
	t.closed.Store(true)
	err := t.file.Close()
	t.writers.Close()
	select {
	case <-t.done:
	case <-ctx.Done():
	}
	return err
}
