package netstack

import "golang.zx2c4.com/wireguard/tun"

// errTooManySegments comes from a device together with packets and isn't fatal.
var errTooManySegments = tun.ErrTooManySegments
