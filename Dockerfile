# Container images: csi-plugin for a node, key-service for a cluster.
#
#   make image                     or:   buildah build --target csi-plugin .
#   make image IMAGE_TARGET=key-service
#
# For a reproducible build pin the two base images by digest:
#   --build-arg GO_IMAGE=docker.io/library/golang@sha256:…
#   --build-arg BASE_IMAGE=docker.io/library/debian@sha256:…
ARG GO_IMAGE=docker.io/library/golang:1.26-bookworm
ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim

FROM ${GO_IMAGE} AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      gcc \
      libc6-dev \
      libcryptsetup-dev \
      libdevmapper-dev \
      pkg-config \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=dev
ARG COMMIT=unknown
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION} -X main.commit=${COMMIT}" -o /out/csi-plugin ./cmd/csi-plugin
RUN CGO_ENABLED=1 go build -trimpath -ldflags "-s -w -X main.version=${VERSION} -X main.commit=${COMMIT}" -o /out/crypt-worker ./cmd/crypt-worker
# With cgo, because a PKCS#11 module is a shared library.
RUN CGO_ENABLED=1 go build -trimpath -ldflags "-s -w -X main.version=${VERSION} -X main.commit=${COMMIT}" -o /out/key-service ./cmd/key-service
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION} -X main.commit=${COMMIT}" -o /out/loopdriver ./test/loopdriver/cmd/loopdriver

# What programs on a node call at run time: mkfs, fsck, resize and mount
# programs, modprobe, and the libraries that crypt-worker is linked with.
FROM ${BASE_IMAGE} AS node
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      btrfs-progs \
      ca-certificates \
      e2fsprogs \
      kmod \
      libcryptsetup12 \
      libdevmapper1.02.1 \
      libgcc-s1 \
      mount \
      util-linux \
      xfsprogs \
 && rm -rf /var/lib/apt/lists/*

# The wrapped driver of the demo. Never for data that anybody needs.
FROM node AS loopdriver
COPY --from=build /out/loopdriver /usr/bin/loopdriver
LABEL org.opencontainers.image.title="cryptcsi loopdriver" \
      org.opencontainers.image.description="CSI driver on sparse files, for demonstrations of cryptcsi only" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["/usr/bin/loopdriver"]

# Needs no privilege and no device. A PKCS#11 module of an HSM's maker is mounted
# or added in an image of one's own; it has to be built against glibc.
FROM ${BASE_IMAGE} AS key-service
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /out/key-service /usr/bin/key-service
ARG VERSION=dev
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="cryptcsi key-service" \
      org.opencontainers.image.description="Keys of encrypted volumes: KMS, object store, life cycle" \
      org.opencontainers.image.source="https://github.com/cryptcsi/cryptcsi" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
USER 65532:65532
ENTRYPOINT ["/usr/bin/key-service"]

# Last, so that it is what a build without a target makes.
FROM node AS csi-plugin
COPY --from=build /out/csi-plugin /usr/bin/csi-plugin
COPY --from=build /out/crypt-worker /usr/bin/crypt-worker
ARG VERSION=dev
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="cryptcsi csi-plugin" \
      org.opencontainers.image.description="Encrypts the volumes of any block CSI driver" \
      org.opencontainers.image.source="https://github.com/cryptcsi/cryptcsi" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
# Creates device nodes itself: udev does not run in a container, and the
# semaphores for talking to it do not reach out of one.
ENV DM_DISABLE_UDEV=1
ENTRYPOINT ["/usr/bin/csi-plugin"]
