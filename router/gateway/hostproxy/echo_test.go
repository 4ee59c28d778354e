package hostproxy

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// What the kernel says of an ICMP error: whose request, which error, and who sent it.
func TestTroubleOf(t *testing.T) {
	control := func(level, kind int32, origin, typ byte, from netip.Addr) []byte {
		data := make([]byte, 16, 44)
		binary.NativeEndian.PutUint32(data, uint32(unix.EHOSTUNREACH))
		data[4], data[5] = origin, typ
		if a := from.AsSlice(); from.Is4() {
			data = append(append(data, 2, 0, 0, 0), append(a, make([]byte, 8)...)...)
		} else {
			data = append(append(data, 10, 0, 0, 0, 0, 0, 0, 0), append(a, 0, 0, 0, 0)...)
		}
		b := make([]byte, unix.CmsgLen(len(data)))
		binary.NativeEndian.PutUint64(b, uint64(len(b)))
		binary.NativeEndian.PutUint32(b[8:], uint32(level))
		binary.NativeEndian.PutUint32(b[12:], uint32(kind))
		copy(b[16:], data)
		return b
	}
	request := []byte{8, 0, 0, 0, 0, 7, 1, 2}
	v4, v6 := netip.MustParseAddr("44.128.0.254"), netip.MustParseAddr("2600:1::fe")
	for _, tt := range []struct {
		name    string
		v6      bool
		request []byte
		oob     []byte
		want    trouble
		ok      bool
	}{
		{"exceeded", false, request, control(unix.IPPROTO_IP, unix.IP_RECVERR, unix.SO_EE_ORIGIN_ICMP, 11, v4), trouble{0x102, true, v4}, true},
		{"unreachable", false, request, control(unix.IPPROTO_IP, unix.IP_RECVERR, unix.SO_EE_ORIGIN_ICMP, 3, v4), trouble{0x102, false, v4}, true},
		{"IPv6 exceeded", true, request, control(unix.IPPROTO_IPV6, unix.IPV6_RECVERR, unix.SO_EE_ORIGIN_ICMP6, 3, v6), trouble{0x102, true, v6}, true},
		{"IPv6 unreachable", true, request, control(unix.IPPROTO_IPV6, unix.IPV6_RECVERR, unix.SO_EE_ORIGIN_ICMP6, 1, v6), trouble{0x102, false, v6}, true},
		{"of this host", false, request, control(unix.IPPROTO_IP, unix.IP_RECVERR, unix.SO_EE_ORIGIN_LOCAL, 11, v4), trouble{0x102, false, v4}, true},
		{"cut", false, request[:7], control(unix.IPPROTO_IP, unix.IP_RECVERR, unix.SO_EE_ORIGIN_ICMP, 11, v4), trouble{}, false},
		{"something else", false, request, control(unix.IPPROTO_IP, unix.IP_TTL, unix.SO_EE_ORIGIN_ICMP, 11, v4), trouble{}, false},
		{"nothing", false, request, nil, trouble{}, false},
	} {
		if got, ok := troubleOf(tt.v6, tt.request, tt.oob); got != tt.want || ok != tt.ok {
			t.Errorf("%s: %+v, %v, want %+v", tt.name, got, ok, tt.want)
		}
	}
}
