package portmap

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"time"

	natpmp "github.com/jackpal/go-nat-pmp"
)

// natPMP speaks NAT-PMP.
type natPMP struct{ Gateway }

func (*natPMP) name() string { return "natpmp" }

// client makes a client for one request, which it can't be called off from.
func (n *natPMP) client(ctx context.Context) (*natpmp.Client, error) {
	limit := tryFor
	if end, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(end))
	}
	if ctx.Err() != nil || limit <= 0 {
		return nil, failed(NoAnswer, "no time left")
	}
	return natpmp.NewClientWithLocalAndTimeout(n.Addr.AsSlice(), n.Local.AsSlice(), limit), nil
}

func (n *natPMP) request(ctx context.Context, own func() (uint16, error), want uint16) (netip.AddrPort, time.Duration, error) {
	c, err := n.client(ctx)
	if err != nil {
		return netip.AddrPort{}, 0, err
	}
	where, err := c.GetExternalAddress()
	if err != nil {
		return netip.AddrPort{}, 0, natPMPError(err)
	}
	external := netip.AddrFrom4(where.ExternalIPAddress)
	if !public(external) {
		return netip.AddrPort{}, 0, failed(NotPublic, "external address %v is not public", external)
	}
	port, err := own()
	if err != nil {
		return netip.AddrPort{}, 0, err
	}
	if want == 0 {
		want = port
	}
	if c, err = n.client(ctx); err != nil {
		return netip.AddrPort{}, 0, err
	}
	got, err := c.AddPortMappingWithDuration("udp", int(port), int(want), lease)
	if err != nil {
		return netip.AddrPort{}, 0, natPMPError(err)
	}
	if got.InternalPort != port {
		return netip.AddrPort{}, 0, failed(BadAnswer, "answer is about port %d", got.InternalPort)
	}
	return netip.AddrPortFrom(external, got.MappedExternalPort), time.Duration(got.PortMappingLifetimeInSeconds) * time.Second, nil
}

func (n *natPMP) release(ctx context.Context, m Mapping) error {
	c, err := n.client(ctx)
	if err != nil {
		return err
	}
	_, err = c.AddPortMapping("udp", int(m.Port), 0, 0)
	return err
}

// natPMPError sorts the library's errors, which have no types.
func natPMPError(err error) error {
	var sys net.Error
	switch text := err.Error(); {
	case errors.As(err, &sys), strings.HasPrefix(text, "Timed out"):
		return failed(NoAnswer, "%w", err)
	case strings.HasPrefix(text, "Non-zero result code"):
		return failed(Refused, "%w", err)
	}
	return failed(BadAnswer, "%w", err)
}
