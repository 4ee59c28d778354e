package packet

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/internal/ownnet"
	"ztgate/router/host/offload"
)

// wire is a device, and the other end of its cable.
type wire struct {
	t          *testing.T
	d          *Device
	own, other net.HardwareAddr
	at         int // index of the other end
	fd         int
	bufs       [][]byte
	sizes      []int
}

func newWire(t *testing.T) *wire {
	t.Helper()
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vpc0"}, PeerName: "vpc1"}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(address("vpc0", "172.31.0.1/24"), address("vpc1")); err != nil {
		t.Fatal(err)
	}
	w := &wire{t: t, d: open(t, "vpc0", "10.0.0.0/24", "fd10::/64"), bufs: make([][]byte, batch), sizes: make([]int, batch)}
	for i := range w.bufs {
		w.bufs[i] = make([]byte, 96+9000)
	}
	own, err := net.InterfaceByName("vpc0")
	if err != nil {
		t.Fatal(err)
	}
	other, err := net.InterfaceByName("vpc1")
	if err != nil {
		t.Fatal(err)
	}
	w.own, w.other, w.at = own.HardwareAddr, other.HardwareAddr, other.Index
	if w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(w.fd) })
	if err := unix.SetsockoptInt(w.fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		t.Fatal(err)
	}
	return w
}

// udp is an IPv4 packet of a datagram.
func udp(from, to string, payload int) []byte {
	b := make([]byte, 28+payload)
	b[0], b[8], b[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	copy(b[12:], netip.MustParseAddr(from).AsSlice())
	copy(b[16:], netip.MustParseAddr(to).AsSlice())
	binary.BigEndian.PutUint16(b[24:], uint16(8+payload))
	return b
}

func (w *wire) frame(to, from net.HardwareAddr, ip []byte) []byte {
	typ := []byte{8, 0}
	if ip[0]>>4 == 6 {
		typ = []byte{0x86, 0xdd}
	}
	return append(append(append(append([]byte{}, to...), from...), typ...), ip...)
}

// send puts a frame on the wire, with a virtio_net_hdr.
func (w *wire) send(head [offload.HeaderLen]byte, frame []byte) error {
	return unix.Sendto(w.fd, append(head[:], frame...), 0, &unix.SockaddrLinklayer{Ifindex: w.at})
}

const last = "10.0.0.255"

// read returns what came, up to now, and how many packets were lost.
func (w *wire) read() (packets [][]byte, lost int) {
	w.t.Helper()
	if err := w.send([offload.HeaderLen]byte{}, w.frame(w.own, w.other, udp("172.31.0.250", last, 0))); err != nil {
		w.t.Fatal(err)
	}
	for {
		n, err := w.d.Read(w.bufs, w.sizes, 96)
		for i := range n {
			p := append([]byte{}, w.bufs[i][96:96+w.sizes[i]]...)
			if len(p) >= 20 && netip.AddrFrom4([4]byte(p[16:])).String() == last {
				return packets, lost
			}
			packets = append(packets, p)
		}
		switch {
		case errors.Is(err, offload.ErrPacket):
			lost++
		case err != nil:
			w.t.Fatal(err)
		}
	}
}

// What comes is only what others send to this host: nothing that it sends itself, nothing for other hosts
// or for many, and no frame inside of another. And who sends can't be a group, nobody, or this host by its address.
func TestNotForUs(t *testing.T) { ownnet.Run(t, testNotForUs) }

func testNotForUs(t *testing.T) {
	w := newWire(t)
	l, err := netlink.LinkByName("vpc0")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.SetPromiscOn(l); err != nil {
		t.Fatal(err)
	}
	w.d.SetOwn([]netip.Addr{netip.MustParseAddr("172.31.0.1")})
	mac := func(s string) net.HardwareAddr {
		m, err := net.ParseMAC(s)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	const client = "172.31.0.66"
	packet := udp(client, "10.0.0.10", 10)
	tagged := func(tags ...byte) []byte {
		f := append(append([]byte{}, w.own...), w.other...)
		return append(append(append(f, tags...), 8, 0), packet...)
	}
	for name, tt := range map[string]struct {
		frame      []byte
		came, lost int
	}{
		"to us":                         {w.frame(w.own, w.other, packet), 1, 0},
		"to another":                    {w.frame(mac("02:00:00:00:00:09"), w.other, packet), 0, 0},
		"to all":                        {w.frame(mac("ff:ff:ff:ff:ff:ff"), w.other, packet), 0, 0},
		"to a group":                    {w.frame(mac("01:00:5e:00:00:01"), w.other, packet), 0, 0},
		"in a VLAN":                     {tagged(0x81, 0, 0, 5), 0, 0},
		"in a VLAN of a VLAN":           {tagged(0x88, 0xa8, 0, 5, 0x81, 0, 0, 6), 0, 0},
		"in a VLAN behind a priority":   {tagged(0x81, 0, 0x60, 0, 0x81, 0, 0, 6), 0, 0},
		"from all":                      {w.frame(w.own, mac("ff:ff:ff:ff:ff:ff"), packet), 0, 1},
		"from a group":                  {w.frame(w.own, mac("33:33:00:00:00:01"), packet), 0, 1},
		"from nobody":                   {w.frame(w.own, mac("00:00:00:00:00:00"), packet), 0, 1},
		"from our own MAC (ipvlan)":     {w.frame(w.own, w.own, packet), 1, 0},
		"in the name of this host":      {w.frame(w.own, w.other, udp("172.31.0.1", "10.0.0.10", 10)), 0, 1},
		"IPv4 that is said to be IPv6":  {append(append(append(append([]byte{}, w.own...), w.other...), 0x86, 0xdd), packet...), 0, 0},
		"IPv6 that is said to be IPv4":  {append(append(append(append([]byte{}, w.own...), w.other...), 8, 0, 0x65), packet[1:]...), 0, 1},
		"longer than it says (padding)": {append(w.frame(w.own, w.other, packet), 1, 2, 3), 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			w.d.known = newNeighbours()
			if err := w.send([offload.HeaderLen]byte{}, tt.frame); err != nil {
				t.Fatal(err)
			}
			packets, lost := w.read()
			if len(packets) != tt.came || lost != tt.lost {
				t.Errorf("%d packets came and %d were refused, want %d and %d", len(packets), lost, tt.came, tt.lost)
			}
			for _, p := range packets {
				if len(p) != len(packet) {
					t.Errorf("a packet of %d bytes has %d", len(packet), len(p))
				}
			}
			for _, a := range []string{client, "172.31.0.1"} {
				if mac, ok := w.d.Heard(netip.MustParseAddr(a)); ok != (tt.came > 0 && a == client) {
					t.Errorf("answers to %s go to %s: %v", a, mac, ok)
				}
			}
		})
	}
	t.Run("sent by this host", func(t *testing.T) {
		_, dst, err := net.ParseCIDR("10.0.0.0/24")
		if err != nil {
			t.Fatal(err)
		}
		via := net.ParseIP("172.31.0.2")
		err = errors.Join(
			netlink.NeighAdd(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: via, HardwareAddr: w.other, State: netlink.NUD_PERMANENT}),
			netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: via}))
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("udp", "10.0.0.10:7")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if packets, lost := w.read(); len(packets) != 0 || lost != 0 {
			t.Errorf("%d packets came and %d were refused", len(packets), lost)
		}
	})
}

// Frames of any length, whose headers say anything, are one packet at most, that is no longer than
// the frame; also while the filter takes all.
func TestOddFrames(t *testing.T) { ownnet.Run(t, testOddFrames) }

func testOddFrames(t *testing.T) {
	w := newWire(t)
	many := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd10::/64")}
	for i := range 5000 {
		many = append(many, netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, byte(i >> 7), byte(i << 1)}), 32))
	}
	six := make([]byte, 60)
	six[0], six[6] = 0x60, unix.IPPROTO_UDP
	copy(six[8:], netip.MustParseAddr("fd31::66").AsSlice())
	copy(six[24:], netip.MustParseAddr("fd10::10").AsSlice())
	for _, prefixes := range [][]netip.Prefix{many[:2], many} {
		if err := w.d.SetPrefixes(prefixes); err != nil {
			t.Fatal(err)
		}
		if loose := w.d.loose.Load() != nil; loose != (len(prefixes) > 2) {
			t.Fatalf("the filter takes all: %v", loose)
		}
		for _, ip := range [][]byte{udp("172.31.0.66", "10.0.0.10", 32), six} {
			for n := 1; n <= len(ip); n++ {
				for _, length := range []int{0, 1, 19, 20, n - 1, n, n + 1, 1500, 65535} {
					binary.BigEndian.PutUint16(ip[2+2*(int(ip[0]>>4)/6):], uint16(length))
					if err := w.send([offload.HeaderLen]byte{}, w.frame(w.own, w.other, ip[:n])); err != nil {
						t.Fatal(err)
					}
					packets, lost := w.read()
					if len(packets)+lost > 1 || len(packets) == 1 && len(packets[0]) > n {
						t.Errorf("%d bytes that say they are %d: %d packets, %d refused", n, length, len(packets), lost)
					}
				}
			}
		}
	}
}

// A large packet that says it is to be cut into more pieces than any sender makes is refused in one piece:
// it costs its sender, a container beside us, as much as one that is cut into forty.
func TestTinySegments(t *testing.T) { ownnet.Run(t, testTinySegments) }

func testTinySegments(t *testing.T) {
	w := newWire(t)
	const payload = 60000
	ip := make([]byte, 40+payload)
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], []byte{172, 31, 0, 66, 10, 0, 0, 10})
	ip[32], ip[33] = 5<<4, 0x10
	for size, want := range map[int]int{1: 0, 8: 0, 200: 0, 536: 112, 1460: 42} {
		h := [offload.HeaderLen]byte{unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, unix.VIRTIO_NET_HDR_GSO_TCPV4}
		for i, v := range []int{54, size, 34, 16} {
			binary.NativeEndian.PutUint16(h[2+2*i:], uint16(v))
		}
		if err := w.send(h, w.frame(w.own, w.other, ip)); err != nil {
			t.Fatal(err)
		}
		packets, lost := w.read()
		if len(packets) != want || (lost == 1) != (want == 0) {
			t.Errorf("segments of %d bytes: %d packets, %d refused, want %d", size, len(packets), lost, want)
		}
	}
}

// What waits to be read has room for a moment at full speed, and no more.
func TestBuffers(t *testing.T) { ownnet.Run(t, testBuffers) }

func testBuffers(t *testing.T) {
	w := newWire(t)
	size := func(fd int, option int) int {
		n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, option)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if err := w.d.raw.Control(func(fd uintptr) {
		if got := size(int(fd), unix.SO_RCVBUF); got != 2*8<<20 { // the kernel counts its own part
			t.Errorf("room for %d bytes that come", got)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if got := size(w.d.send, unix.SO_SNDBUF); got != 2*4<<20 {
		t.Errorf("room for %d bytes that go", got)
	}
}

// An interface that takes nothing more holds a batch up for a moment, and no longer.
func TestFullInterface(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK, 0) // stands for the interface
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	for err == nil {
		err = unix.Send(pair[0], make([]byte, 1000), 0)
	}
	d := &Device{send: pair[0], known: newNeighbours()}
	d.writers.New = func() any { return newWriter(d, false) }
	bufs := make([][]byte, batch)
	for i := range bufs {
		bufs[i] = append(make([]byte, offload.EthernetLen), udp("10.0.0.10", "172.31.0.66", 10)...)
	}
	d.start = time.Now()
	d.known.learn(0, keyOf(netip.MustParseAddr("172.31.0.66")), 0x020000000066)
	begun := time.Now()
	if n, err := d.Write(bufs, offload.EthernetLen); n != 0 || !errors.Is(err, unix.EAGAIN) {
		t.Errorf("%d of %d packets, %v", n, batch, err)
	}
	if took := time.Since(begun); took > time.Second {
		t.Errorf("it took %v", took)
	}
}
