package lab

import (
	"context"
	"errors"
	"net/netip"
)

// Kernel is what the overlay is compared with: the same hosts and links, but the
// gateway forwards to the office's underlay address with the kernel's own
// masquerade. Nothing is encrypted.
type Kernel struct {
	*Topology
	Office, Gateway, VPC *Namespace
	OfficeAddress        netip.Addr
}

// StartKernel brings the comparison up. It must be closed.
func StartKernel(ctx context.Context, prefix string) (_ *Kernel, err error) {
	t, err := New(ctx, prefix)
	if err != nil {
		return nil, err
	}
	s := &Scenario{Topology: t}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	if err := s.build(ctx); err != nil {
		return nil, err
	}
	if err := errors.Join(masquerade(ctx, s.Gateway, "eth-inet"),
		s.VPC.AddRoute(netip.PrefixFrom(officeInet.Addr(), 32), gwVPC.Addr())); err != nil {
		return nil, err
	}
	return &Kernel{t, s.Office, s.Gateway, s.VPC, officeInet.Addr()}, nil
}
