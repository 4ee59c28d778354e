package tuntap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ztgate/internal/testwait"
	"ztgate/router/host/offload"
)

// eachMethod runs a test for every way of writing that this kernel has.
func eachMethod(t *testing.T, f func(t *testing.T, how Method)) {
	for _, how := range []Method{Writev, IOUring} {
		t.Run(string(how), func(t *testing.T) {
			if how == IOUring {
				if err := Probe(); err != nil {
					t.Skip(err)
				}
			}
			f(t, how)
		})
	}
}

// messages is a pair of sockets that keeps what each write had.
func messages(t testing.TB) (raw syscall.RawConn, read func() string) {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	to := os.NewFile(uintptr(p[0]), "to")
	t.Cleanup(func() { _ = to.Close(); _ = unix.Close(p[1]) })
	if raw, err = to.SyscallConn(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<16)
	return raw, func() string {
		n, err := unix.Read(p[1], buf)
		if err != nil {
			return err.Error()
		}
		return string(buf[min(offload.HeaderLen, n):n])
	}
}

// packets are some that nothing is merged of.
func packets(format string, n int) (out [][]byte) {
	for i := range n {
		out = append(out, fmt.Appendf(nil, "##"+format, i))
	}
	return out
}

func TestWriteOrder(t *testing.T) {
	eachMethod(t, func(t *testing.T, how Method) {
		raw, read := messages(t)
		w := NewWriters(0, true, how)
		defer w.Close()
		for _, n := range []int{1, 2, 100, 128, 129, 200} {
			if m, err := w.Write(raw, packets("packet %d", n), 2); m != n || err != nil {
				t.Fatalf("%d of %d: %v", m, n, err)
			}
			for i := range n {
				if got, want := read(), fmt.Sprintf("packet %d", i); got != want {
					t.Fatalf("%d of %d is %q", i, n, got)
				}
			}
		}
	})
}

// segment makes a TCP segment of a flow in an Ethernet frame, with right checksums.
func segment(port uint16, seq uint32, payload []byte) []byte {
	f := append(make([]byte, offload.EthernetLen+20+20), payload...)
	f[12] = 8 // IPv4
	ip, tcp := f[offload.EthernetLen:], f[offload.EthernetLen+20:]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], []byte{10, 99, 0, 2, 10, 99, 0, 3})
	binary.BigEndian.PutUint16(ip[10:], ^sum16(0, ip[:20]))
	binary.BigEndian.PutUint16(tcp, port)
	binary.BigEndian.PutUint32(tcp[4:], seq)
	tcp[12], tcp[13] = 5<<4, 0x10 // ACK
	binary.BigEndian.PutUint16(tcp[16:], ^sum16(int(sum16(unix.IPPROTO_TCP+len(tcp), ip[12:20])), tcp))
	return f
}

// sum16 adds to a sum as RFC 1071 does.
func sum16(sum int, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		sum += int(binary.BigEndian.Uint16(b))
	}
	if len(b) > 0 {
		sum += int(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// Merged packets of many flows are more than one call takes.
func TestWriteMerged(t *testing.T) {
	eachMethod(t, func(t *testing.T, how Method) {
		raw, read := messages(t)
		w := NewWriters(0, true, how)
		defer w.Close()
		var bufs [][]byte
		const flows, each = 12, 50
		for i := range each {
			for flow := range flows {
				bufs = append(bufs, segment(uint16(flow), uint32(2*i), []byte{byte(i), byte(flow)})[offload.EthernetLen:])
			}
		}
		if m, err := w.Write(raw, bufs, 0); m != len(bufs) || err != nil {
			t.Fatalf("%d of %d: %v", m, len(bufs), err)
		}
		for flow := range flows {
			got := read()[20+20:]
			for i := range each {
				if got[2*i] != byte(i) || got[2*i+1] != byte(flow) {
					t.Fatalf("flow %d: %x", flow, got)
				}
			}
		}
	})
}

// A packet that the kernel refuses is lost alone, and the first error is the one that
// is returned.
func TestWriteErrors(t *testing.T) {
	eachMethod(t, func(t *testing.T, how Method) {
		raw, read := messages(t)
		w := NewWriters(0, true, how)
		defer w.Close()
		bufs := packets("packet %d", 4)
		bufs[1] = make([]byte, 1<<20)
		bufs = append(bufs, make([]byte, 1<<20))
		if n, err := w.Write(raw, bufs, 2); n != 3 || !errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("%d written, %v", n, err)
		}
		for _, want := range []string{"packet 0", "packet 2", "packet 3"} {
			if got := read(); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		}
		full := 0
		for n := 1; n > 0; full += n {
			var err error
			if n, err = w.Write(raw, packets("packet %d", 20), 2); n < 20 && !errors.Is(err, unix.EAGAIN) {
				t.Fatalf("%d written, %v", n, err)
			}
		}
		for i := range full {
			if got, want := read(), fmt.Sprintf("packet %d", i%20); got != want {
				t.Fatalf("packet %d is %q", i, got)
			}
		}
	})
}

func TestShortWrite(t *testing.T) {
	eachMethod(t, func(t *testing.T, how Method) {
		r, f, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		defer f.Close()
		raw, err := f.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		w := NewWriters(0, true, how)
		defer w.Close()
		if n, err := w.Write(raw, [][]byte{make([]byte, 1000), make([]byte, 1<<17)}, 0); n != 1 || !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("%d written, %v", n, err)
		}
	})
}

// TestCloseWhileWriting closes interfaces that goroutines write to.
func TestCloseWhileWriting(t *testing.T) {
	eachMethod(t, func(t *testing.T, how Method) {
		for range 5 {
			s := newSide(t, "10.99.0.1/24", how)
			var g sync.WaitGroup
			began := make(chan struct{}, 2*maxRings)
			for range 2 * maxRings {
				g.Go(func() {
					bufs := packets("\x00 neither IPv4 nor IPv6 %d", 50)
					_, err := s.tun.Write(bufs, 2)
					began <- struct{}{}
					for errors.Is(err, unix.EINVAL) {
						_, err = s.tun.Write(bufs, 2)
					}
					if !errors.Is(err, os.ErrClosed) {
						t.Errorf("write: %v", err)
					}
				})
			}
			for range cap(began) {
				<-began
			}
			if err := s.tun.Close(); err != nil {
				t.Error(err)
			}
			g.Wait()
			if n, err := s.tun.Write(packets("late %d", 3), 2); n != 0 || !errors.Is(err, os.ErrClosed) {
				t.Errorf("after the end: %d written, %v", n, err)
			}
		}
		testwait.For(t, time.Second, "the end of all rings", func() bool { return rings(t) == 0 })
	})
}

// rings counts the descriptors of rings.
func rings(t *testing.T) (n int) {
	t.Helper()
	files, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if to, err := os.Readlink(f); err == nil && strings.Contains(to, "io_uring") {
			n++
		}
	}
	return n
}

func TestJudge(t *testing.T) {
	for res, want := range map[int32]string{
		-int32(unix.EBADFD):     "",
		-int32(unix.EOPNOTSUPP): "Linux 6.4",
		-int32(unix.EINVAL):     "invalid argument",
		10:                      "otherwise",
	} {
		err := judge(res)
		if got := fmt.Sprint(err); (err == nil) != (want == "") || !strings.Contains(got, want) {
			t.Errorf("%d: %s", res, got)
		}
	}
}

// TestSeccomp starts this test again in processes that may not use io_uring, as in
// most containers.
func TestSeccomp(t *testing.T) {
	if nr := os.Getenv("ZTGATE_TEST_REFUSED"); nr != "" {
		testRefused(t, nr)
		return
	}
	if err := Probe(); err != nil {
		t.Skip(err)
	}
	for name, nr := range map[string]int{"setup": unix.SYS_IO_URING_SETUP, "enter": unix.SYS_IO_URING_ENTER} {
		t.Run(name, func(t *testing.T) {
			c := exec.Command(os.Args[0], "-test.run=^TestSeccomp$", "-test.v")
			c.Env = append(os.Environ(), fmt.Sprint("ZTGATE_TEST_REFUSED=", nr))
			if out, err := c.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

func testRefused(t *testing.T, nr string) {
	raw, read := messages(t)
	before := NewWriters(0, true, IOUring)
	defer before.Close()
	write := func(w *Writers) {
		t.Helper()
		if n, err := w.Write(raw, packets("packet %d", 20), 2); n != 20 || err != nil {
			t.Errorf("%d written, %v", n, err)
		}
		for i := range 20 {
			if got, want := read(), fmt.Sprintf("packet %d", i); got != want {
				t.Errorf("packet %d is %q", i, got)
			}
		}
	}
	write(before)
	var refused uint32
	if _, err := fmt.Sscan(nr, &refused); err != nil {
		t.Fatal(err)
	}
	refuse(t, refused)
	err := Probe()
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "seccomp") {
		t.Errorf("probe: %v", err)
	}
	write(before)
	after := NewWriters(0, true, IOUring)
	defer after.Close()
	write(after)
}

// refuse makes a system call fail with EPERM in the whole process, from now on.
func refuse(t *testing.T, nr uint32) {
	t.Helper()
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: nr},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		t.Fatal(errno)
	}
}

func TestWriteAllocations(t *testing.T) {
	eachMethod(t, func(t *testing.T, how Method) {
		raw, read := messages(t)
		w := NewWriters(0, true, how)
		defer w.Close()
		bufs := packets("packet %d", 20)
		if n := testing.AllocsPerRun(100, func() {
			if n, err := w.Write(raw, bufs, 2); n != 20 || err != nil {
				t.Errorf("%d written, %v", n, err)
			}
			for range bufs {
				read()
			}
		}); n > 20 { // the strings of read
			t.Errorf("%v allocations", n-20)
		}
	})
}

// BenchmarkWrite writes small packets that the kernel then has no use for.
func BenchmarkWrite(b *testing.B) {
	for _, how := range []Method{Writev, IOUring} {
		for _, batch := range []int{1, 2, 8, 32} {
			b.Run(fmt.Sprintf("%s/%d", how, batch), func(b *testing.B) {
				s := newSide(b, "10.99.0.1/24", how)
				var bufs [][]byte
				for i := range batch {
					bufs = append(bufs, segment(uint16(i), 1, nil))
				}
				b.ReportAllocs()
				for b.Loop() {
					if n, err := s.tun.Write(bufs, offload.EthernetLen); n != batch || err != nil {
						b.Fatal(n, err)
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/packet")
			})
		}
	}
}
