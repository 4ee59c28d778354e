//go:build !linux

package portmap

// Gateways finds none: only Linux is asked for its routes.
func Gateways() ([]Gateway, error) { return nil, nil }
