package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Iperf says how iperf3 measures.
type Iperf struct {
	UDP      bool
	Reverse  bool   // the server sends
	Bitrate  string // "" = as fast as it goes
	Length   int    // of UDP payloads
	Streams  int
	Duration time.Duration
	Server   netip.Addr // where the server listens, if clients know it by another address
}

// IperfResult is what the receiver saw.
type IperfResult struct {
	BitsPerSecond float64       `json:"bitsPerSecond"`
	Bytes         float64       `json:"bytes"`
	LostPercent   float64       `json:"lostPercent"` // UDP only, as the following
	Lost          int           `json:"lost"`
	Datagrams     int           `json:"datagrams"`
	Retransmits   int           `json:"retransmits"` // TCP only
	Duration      time.Duration `json:"nanoseconds"`
}

// udpWindow doubles the receive buffer of iperf3, since the kernel reserves twice
// what is asked for. The default holds 90 datagrams of 1,200 bytes: 43 ms of 20
// Mbit/s, for which a busy machine lets iperf3 wait.
const udpWindow = "200K"

// RunIperf runs an iperf3 server in one namespace and a client in another.
func RunIperf(ctx context.Context, server, client *Namespace, to netip.Addr, o Iperf) (r IperfResult, err error) {
	ctx, cancel := context.WithTimeout(ctx, o.Duration+30*time.Second)
	defer cancel()
	const port = "5201"
	at := to
	if o.Server.IsValid() {
		at = o.Server
	}
	srv := server.Command(ctx, "iperf3", "-s", "-1", "-p", port, "-B", at.String())
	srv.Cancel = func() error { return srv.Process.Signal(unix.SIGTERM) }
	if err := server.Do(srv.Start); err != nil {
		return r, fmt.Errorf("start iperf3 server: %w", err)
	}
	defer func() {
		cancel()
		_ = srv.Wait()
	}()
	if err := until(ctx, func() error { return server.listens(at, port) }); err != nil {
		return r, err
	}
	args := []string{"-c", to.String(), "-p", port, "-J", "-t", strconv.Itoa(int(o.Duration.Seconds())), "-P", strconv.Itoa(max(o.Streams, 1)), "--connect-timeout", "5000"}
	if o.Bitrate != "" {
		args = append(args, "-b", o.Bitrate)
	}
	if o.UDP {
		args = append(args, "-u", "-l", strconv.Itoa(o.Length), "-w", udpWindow)
	}
	if o.Reverse {
		args = append(args, "-R")
	}
	var out bytes.Buffer
	c := client.Command(ctx, "iperf3", args...)
	c.Stdout = &out
	runErr := client.Do(c.Run)
	var v struct {
		Error string
		End   struct {
			SumReceived iperfSum `json:"sum_received"`
			SumSent     iperfSum `json:"sum_sent"`
			Sum         iperfSum `json:"sum"`
		}
	}
	if err := json.Unmarshal(out.Bytes(), &v); err != nil {
		return r, fmt.Errorf("iperf3: %w: %w", runErr, err)
	}
	if v.Error != "" || runErr != nil {
		return r, fmt.Errorf("iperf3: %s: %w", v.Error, runErr)
	}
	got := v.End.SumReceived
	if got.Seconds == 0 {
		got = v.End.Sum
	}
	if o.UDP {
		got.LostPercent, got.LostPackets, got.Packets = v.End.Sum.LostPercent, v.End.Sum.LostPackets, v.End.Sum.Packets
	}
	return IperfResult{BitsPerSecond: got.BitsPerSecond, Bytes: got.Bytes, LostPercent: got.LostPercent,
		Lost: got.LostPackets, Datagrams: got.Packets,
		Retransmits: v.End.SumSent.Retransmits, Duration: time.Duration(got.Seconds * float64(time.Second))}, nil
}

type iperfSum struct {
	Bytes         float64
	Seconds       float64
	BitsPerSecond float64 `json:"bits_per_second"`
	LostPercent   float64 `json:"lost_percent"`
	LostPackets   int     `json:"lost_packets"`
	Packets       int
	Retransmits   int
}

// listens reports nil when somebody listens on a TCP port in the namespace.
func (n *Namespace) listens(a netip.Addr, port string) error {
	out, err := exec.Command("ip", "netns", "exec", n.Name, "ss", "-Hltn", "sport", "=", ":"+port).CombinedOutput()
	if err != nil {
		return fmt.Errorf("list listeners in %q: %w: %s", n.Name, err, out)
	}
	if !bytes.Contains(out, []byte(net.JoinHostPort(a.String(), port))) {
		return fmt.Errorf("nobody listens on %s port %s in %q", a, port, n.Name)
	}
	return nil
}
