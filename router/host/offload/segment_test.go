package offload

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// tcpFrame builds an Ethernet frame with a TCP segment, as the kernel hands it
// over for segmentation: the checksum field holds the pseudo-header's sum.
func tcpFrame(v6 bool, payload []byte) (b []byte, tcp int) {
	tcp = 34
	if v6 {
		tcp = 54
	}
	b = make([]byte, tcp+32+len(payload))
	copy(b[tcp+32:], payload)
	if v6 {
		b[12], b[13] = 0x86, 0xdd
		b[14], b[20], b[21] = 0x60, 6, 64
		b[37], b[53] = 1, 2
		binary.BigEndian.PutUint16(b[18:], uint16(len(b)-54))
	} else {
		b[12], b[13], b[14], b[22], b[23] = 8, 0, 0x45, 64, 6
		copy(b[26:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
		binary.BigEndian.PutUint16(b[16:], uint16(len(b)-14))
		binary.BigEndian.PutUint16(b[18:], 0xfffe)
	}
	binary.BigEndian.PutUint32(b[tcp+4:], 0xfffffff0)
	b[tcp+12], b[tcp+13] = 8<<4, 0x19 // 12 bytes of options; ACK PSH FIN
	return b, tcp
}

func vnet(flags, kind byte, size, start, offset int) []byte {
	h := make([]byte, HeaderLen)
	h[0], h[1] = flags, kind
	binary.NativeEndian.PutUint16(h[4:], uint16(size))
	binary.NativeEndian.PutUint16(h[6:], uint16(start))
	binary.NativeEndian.PutUint16(h[8:], uint16(offset))
	return h
}

func cut(b []byte) ([][]byte, error) { return cutLink(b, EthernetLen) }

func cutLink(b []byte, link int) ([][]byte, error) {
	var out [][]byte
	buf := make([]byte, 9000)
	s := Segmenter{Link: link}
	err := s.Start(b)
	for err == nil && s.Pending() {
		var n int
		if n, err = s.Next(buf); err == nil {
			out = append(out, slices.Clone(buf[:n]))
		}
	}
	return out, err
}

// checkTCP verifies the checksums of a frame and returns its payload.
func checkTCP(t *testing.T, f []byte, tcp int) []byte {
	t.Helper()
	addresses := f[26:34]
	if tcp == 54 {
		addresses = f[22:54]
	} else if c := fold(sum(f[14:34], 0)); c != 0 {
		t.Errorf("IP checksum is off by %x", c)
	}
	if c := fold(sum(f[tcp:], sum(addresses, word(6+len(f)-tcp)))); c != 0 {
		t.Errorf("TCP checksum is off by %x", c)
	}
	return f[tcp+32:]
}

func TestSegmentTCP(t *testing.T) {
	payload := make([]byte, 3500)
	for i := range payload {
		payload[i] = byte(i * 7)
	}
	for _, v6 := range []bool{false, true} {
		frame, tcp := tcpFrame(v6, payload)
		kind := byte(vnetTCP4)
		if v6 {
			kind = vnetTCP6
		}
		got, err := cut(append(vnet(vnetNeedsChecksum, kind, 1000, tcp, 16), frame...))
		if err != nil || len(got) != 4 {
			t.Fatalf("v6 %v: %d frames, %v, want 4", v6, len(got), err)
		}
		var all []byte
		for i, f := range got {
			all = append(all, checkTCP(t, f, tcp)...)
			if seq := binary.BigEndian.Uint32(f[tcp+4:]); seq != 0xfffffff0+uint32(i*1000) {
				t.Errorf("frame %d has sequence number %x", i, seq)
			}
			if last := f[tcp+13] == 0x19; last != (i == 3) {
				t.Errorf("frame %d has flags %x", i, f[tcp+13])
			}
			if id := binary.BigEndian.Uint16(f[18:]); !v6 && id != uint16(0xfffe+i) {
				t.Errorf("frame %d has IP ID %x", i, id)
			}
		}
		if !bytes.Equal(all, payload) {
			t.Error("the payload differs")
		}
	}
}

// What comes off a network card in one piece may have been checked by it, and may answer
// a mark of congestion.
func TestSegmentReceived(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		frame, tcp := tcpFrame(v6, make([]byte, 2500))
		frame[tcp+13] |= tcpCWR
		kind := byte(vnetTCP4)
		if v6 {
			kind = vnetTCP6
		}
		got, err := cut(append(vnet(unix.VIRTIO_NET_HDR_F_DATA_VALID, kind|unix.VIRTIO_NET_HDR_GSO_ECN, 1000, 0, 0), frame...))
		if err != nil || len(got) != 3 {
			t.Fatalf("IPv6 %v: %d frames, %v", v6, len(got), err)
		}
		for i, f := range got {
			checkTCP(t, f, tcp)
			if cwr := f[tcp+13]&tcpCWR != 0; cwr != (i == 0) {
				t.Errorf("IPv6 %v: frame %d has CWR %v", v6, i, cwr)
			}
		}
	}
}

// A large packet is cut into so many, and into more not at all.
func TestSegmentsAreBounded(t *testing.T) {
	for name, tt := range map[string]struct {
		v6   bool
		kind byte
	}{"TCP": {false, vnetTCP4}, "TCP, IPv6": {true, vnetTCP6}, "UDP": {false, vnetUDP}, "UDP, IPv6": {true, vnetUDP}} {
		frame, l4 := tcpFrame(tt.v6, make([]byte, 60000))
		head, field := 32, 16
		if tt.kind == vnetUDP {
			frame[23], head, field = unix.IPPROTO_UDP, 8, 6
		}
		payload := len(frame) - l4 - head
		for size, want := range map[int]int{1: 0, (payload - 1) / maxSegments: 0, (payload + maxSegments - 1) / maxSegments: maxSegments} {
			got, err := cut(append(vnet(vnetNeedsChecksum, tt.kind, size, l4, field), frame...))
			if len(got) != want || (err != nil) != (want == 0) {
				t.Errorf("%s in segments of %d bytes: %d packets, %v, want %d", name, size, len(got), err, want)
			}
		}
	}
}

func TestSegmentChecksum(t *testing.T) {
	frame, tcp := tcpFrame(false, []byte("odd"))
	putSum(frame[tcp+16:], ^fold(sum(frame[26:34], word(6+len(frame)-tcp))))
	frame[24], frame[25] = 0, 0
	putSum(frame[24:], fold(sum(frame[14:34], 0)))
	got, err := cut(append(vnet(vnetNeedsChecksum, 0, 0, tcp, 16), frame...))
	if err != nil || len(got) != 1 {
		t.Fatal(len(got), err)
	}
	checkTCP(t, got[0], tcp)
}

func FuzzSegment(f *testing.F) {
	frame, tcp := tcpFrame(false, make([]byte, 3000))
	f.Add(append(vnet(1, vnetTCP4, 1000, tcp, 16), frame...))
	frame, tcp = tcpFrame(true, make([]byte, 3000))
	f.Add(append(vnet(1, vnetTCP6, 1000, tcp, 16), frame...))
	f.Add(append(vnet(1, 0, 0, tcp, 16), frame...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) <= MaxRead {
			_, _ = cutLink(b, 0)
			_, _ = cut(b)
		}
	})
}
