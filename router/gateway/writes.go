package gateway

import (
	"errors"

	"ztgate/router/control"
	"ztgate/router/host/tuntap"
)

// chooseWrites decides once how packets are written to interfaces.
func (s *service) chooseWrites() tuntap.Method {
	err := errors.New("vpc.io_uring is off")
	if s.config().VPC.IOUring != "off" {
		err = tuntap.Probe()
	}
	if err != nil {
		s.writes = &control.Writes{Method: string(tuntap.Writev), Reason: err.Error()}
		s.log.Info("packets are written to interfaces one by one", "method", s.writes.Method, "reason", s.writes.Reason)
		return tuntap.Writev
	}
	s.writes = &control.Writes{Method: string(tuntap.IOUring)}
	s.log.Info("packets are written to interfaces in batches", "method", s.writes.Method)
	return tuntap.IOUring
}
