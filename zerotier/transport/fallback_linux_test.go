//go:build linux && !portableudp

package transport

import (
	"bytes"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// When the kernel refuses segmentation, e.g. on a path with a smaller MTU, the
// datagrams go out plain, and the next ones without the detour.
func TestSegmentationRefused(t *testing.T) {
	rx := newSink(t, Config{NoSecondary: true})
	u := open(t, Config{NoSecondary: true})
	if !u.Sockets()[0].GSO {
		t.Skip("no GSO")
	}
	// Without checksums the kernel answers EINVAL to segmented messages only.
	s := u.table.Load().all[0]
	if err := s.raw.Control(func(fd uintptr) {
		if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_NO_CHECK, 1); err != nil {
			t.Fatal(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	tx := u.NewSender()
	for round := range 2 {
		for i := range 10 {
			tx.Send(s.id, rx.endpoint(), nil, datagram('a', i, 1000))
		}
		tx.Flush()
		for i := range 10 {
			if got := rx.next(t); !bytes.Equal(got, datagram('a', i, 1000)) {
				t.Fatalf("round %d: datagram %d differs", round, i)
			}
		}
	}
	if n := u.Stats().Fallbacks; n != 1 {
		t.Errorf("fallbacks = %d, want 1", n)
	}
	other := netip.MustParseAddr("127.0.0.2")
	if s.canSegment(loopback[0], 1000) || !s.canSegment(other, 1000) {
		t.Error("the refusal must hold for its destination only")
	}
	s.segmentFailed(loopback[0], 900, unix.EMSGSIZE)
	s.segmentFailed(loopback[0], 1100, unix.EMSGSIZE)
	if s.canSegment(loopback[0], 900) || !s.canSegment(loopback[0], 899) {
		t.Error("the refusal must hold for what isn't smaller")
	}
	s.segmentFailed(loopback[0], 1000, unix.EIO)
	if s.canSegment(other, 100) {
		t.Error("EIO must turn segmentation off for the socket")
	}
}

// A datagram that is too large for the link isn't cut by the kernel, or what a path
// carries couldn't be found out.
func TestNotCut(t *testing.T) {
	for _, a := range loopback {
		u := open(t, Config{NoSecondary: true, Bind: []netip.Addr{a}})
		s := u.table.Load().all[0]
		level, option, want := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE
		if a.Is6() {
			level, option, want = unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1
		}
		if err := s.raw.Control(func(fd uintptr) {
			if got, err := unix.GetsockoptInt(int(fd), level, option); err != nil || got != want {
				t.Errorf("%v: option %d is %d, %v, want %d", a, option, got, err, want)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTransmitPlain(t *testing.T) {
	rx := newSink(t, Config{NoSecondary: true})
	u := open(t, Config{NoSecondary: true})
	id := u.Sockets()[0].ID
	tx := u.NewSender()
	for i := range 5 {
		tx.Send(id, rx.endpoint(), nil, datagram('a', i, 1000-i/4))
		tx.Send(id, netip.AddrPortFrom(loopback[0], 9), nil, datagram('b', i, 1000)) // lies between
	}
	s := u.table.Load().all[0]
	if err := s.raw.Control(func(fd uintptr) {
		tx.wait = sendWait
		tx.transmitPlain(fd, 0)
	}); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		if got := rx.next(t); !bytes.Equal(got, datagram('a', i, 1000-i/4)) {
			t.Fatalf("datagram %d differs", i)
		}
	}
}
