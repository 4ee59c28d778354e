//go:build libzt && cgo

package config

const libztBuilt = true
