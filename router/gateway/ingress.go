package gateway

import (
	"context"
	"net/netip"

	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/host"
	"ztgate/router/plan"
)

// ingress is how packets of the VPC come to the plane and go back to it, with all of the
// host that depends on that.
type ingress interface {
	hostWays
	device() netstack.Device
	name() string // of the interface
	// prepare adds what the plane must do for it.
	prepare(base *netstack.Config) error
	// state reads the host without what is ours on it.
	state() (*plan.Host, error)
	// begin readies the interface before the plane is there, and enforce carries a plan to
	// it and to the host; it tells the plane of another MTU.
	begin(p *plan.Plan) error
	enforce(cfg *config.Config, p *plan.Plan) error
	// checks looks at the host's settings and the interface, and wayCheck whether packets
	// of clients come to the plane and answers back, as far as those don't say so.
	checks(p *plan.Plan) []control.Check
	wayCheck(p *plan.Plan) control.Check
	// announces looks whether hosts of the VPC find our addresses among them, as far as that
	// can be known.
	announces(p *plan.Plan) control.Check
	// beyond is the way of packets of overlay hosts to the internet.
	beyond(m plan.Masquerade, dst netip.Addr) (host.Way, error)
	// client sends from our address as clients do from theirs, and through says by what.
	client(src netip.Addr) clientDialer
	through() string
	// knock sends a datagram that the plane reads to an address of its own.
	knock(dst netip.AddrPort) error
	parts() []func(context.Context) error
	// close undoes what was done; failed says that somebody will start us again.
	close(failed bool)
}

// clientDialer sends as a client does.
type clientDialer interface {
	dialer
	// pathMTU is as [hostDialer.pathMTU] has it.
	pathMTU(ctx context.Context, dst netip.Addr, first int) (int, error)
}

// local stands for this host itself where an interface is named.
const local = "lo"

func firstInterface(vpc config.VPCConfig) string {
	if len(vpc.Interfaces) > 0 {
		return vpc.Interfaces[0]
	}
	return local
}
